"""Pictures with classes: a folder a class, or a folder of IDX files (MNIST, Fashion-MNIST).

| layout | what it is |
|---|---|
| FOLDER/cat/1.jpg, FOLDER/dog/2.png | every folder is a class; a part is held out |
| FOLDER/train/cat/1.jpg, FOLDER/val/cat/2.jpg | the same, split already (val, valid, validation or test) |
| FOLDER/train-images-idx3-ubyte.gz, … | IDX |
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from volvelle.data.augment import View
from volvelle.data.idx import FASHION_MNIST, is_idx_folder, read_idx_folder
from volvelle.data.images import check_images, list_images, read_image, to_image
from volvelle.data.images_prepare import Preprocessing
from volvelle.data.text import OnBad
from volvelle.errors import UsageError, VolvelleError

TRAIN, HELD = ("train", "training"), ("val", "valid", "validation", "test")


class Pictures(Protocol):
    """Pictures by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Image.Image: ...

    def source(self, index: int, /) -> str:
        """Where the picture comes from, for messages."""
        ...


@dataclass(frozen=True)
class Files:
    """Pictures in files, decoded when asked for."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        return read_image(self.paths[index])

    def source(self, index: int) -> str:
        """The path."""
        return str(self.paths[index])


@dataclass(frozen=True)
class Arrays:
    """Pictures in memory: uint8 (n, y, x)."""

    pixels: Tensor
    name: str

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Image.Image:
        return to_image(self.pixels[index])

    def source(self, index: int) -> str:
        """The file's name and the number in it."""
        return f"{self.name}[{index}]"


@dataclass(frozen=True)
class Labelled:
    """Pictures, the number of each one's class, the classes' names, and which pictures count (`order`)."""

    pictures: Pictures
    labels: Sequence[int]
    classes: tuple[str, ...]
    order: Sequence[int]
    skipped: Sequence[str] = field(default_factory=tuple)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        at = self.order[index]
        return self.pictures[at], self.labels[at]

    def source(self, index: int) -> str:
        """Where picture `index` comes from."""
        return self.pictures.source(self.order[index])

    @property
    def counts(self) -> list[int]:
        """Pictures of each class."""
        found = Counter(self.labels[at] for at in self.order)
        return [found[number] for number in range(len(self.classes))]

    def __str__(self) -> str:
        more = f", {len(self.skipped):,} bad files left out" if self.skipped else ""
        return f"{len(self):,} pictures of {len(self.classes)} classes{more}"

    def split(self, share: float, seed: int) -> tuple[Labelled, Labelled]:
        """Set a share of every class aside, seeded: at least one picture of each class that has two."""
        groups: dict[int, list[int]] = {}
        for at in self.order:
            groups.setdefault(self.labels[at], []).append(at)
        held: set[int] = set()
        for label, group in sorted(groups.items()):
            random.Random(f"split/{seed}/{label}").shuffle(group)
            count = min(len(group) - 1, max(1, round(share * len(group))))
            held.update(group[:count])
        kept = [at for at in self.order if at not in held]
        return replace(self, order=kept), replace(self, order=sorted(held), skipped=())


class Views:
    """Random views of labelled pictures, to train on: (uint8 (3, size, size), class); the loader asks `draw`."""

    def __init__(self, pictures: Labelled, how: Preprocessing, view: View):
        self.pictures, self.how, self.view = pictures, how, view

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.draw(index, random.Random(index))

    def draw(self, index: int, generator: random.Random) -> tuple[Tensor, int]:
        """Sample `index` with its chances taken from the generator."""
        image, label = self.pictures[index]
        return self.view(image, self.how, generator), label

    def source(self, index: int) -> str:
        """Where the picture comes from."""
        return self.pictures.source(index)


class Prepared(Views):
    """Labelled pictures as a network wants them, for measuring: the middle, always the same."""

    def __init__(self, pictures: Labelled, how: Preprocessing):
        super().__init__(pictures, how, View())

    def draw(self, index: int, generator: random.Random) -> tuple[Tensor, int]:
        """Sample `index`; nothing is drawn."""
        image, label = self.pictures[index]
        return self.how.prepare(image), label


def collate_labelled(items: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Stack samples: images uint8 (b, 3, y, x) and labels int64 (b)."""
    images, labels = zip(*items, strict=True)
    return {"images": torch.stack(images), "labels": torch.tensor(labels)}


def read_labelled(
    path: str | os.PathLike[str], *, on_bad: OnBad = "stop", classes: Sequence[str] | None = None
) -> tuple[Labelled, Labelled | None]:
    """Pictures to train on, and those to measure on where the folder has such a part.

    `classes` are the names that a network knows already: the folder may hold fewer, in any order, but no others. Raises
    VolvelleError for bad files (named, with the reasons), for empty classes, and where there is one class only.
    """
    folder = Path(path)
    if folder.is_dir() and is_idx_folder(folder):
        return _read_idx(folder, classes)
    parts = train_and_held(folder)
    if parts is None:
        return _read_folders(folder, on_bad, classes), None
    found = _read_folders(parts[0], on_bad, classes)
    return found, _read_folders(parts[1], on_bad, found.classes)


def train_and_held(folder: Path) -> tuple[Path, Path] | None:
    """The folders to train and to measure on within a folder; None where it does not have both."""
    inside = {entry.name.lower(): entry for entry in folder.iterdir() if entry.is_dir()} if folder.is_dir() else {}
    train = next((inside[name] for name in TRAIN if name in inside), None)
    held = next((inside[name] for name in HELD if name in inside), None)
    return None if train is None or held is None else (train, held)


def _read_folders(folder: Path, on_bad: OnBad, classes: Sequence[str] | None) -> Labelled:
    files = list_images(folder)
    names = sorted({file.relative_to(folder).parts[0] for file in files if file.parent != folder})
    loose = [file for file in files if file.parent == folder]
    layout = f"wanted: {folder}/CLASS/picture.jpg, a folder for each class"
    if loose and not names:
        raise VolvelleError(f"{folder}: {len(loose):,} pictures, but no folders of classes", tip=layout)
    if loose:
        raise VolvelleError(f"{loose[0]}: lies beside the folders of classes, in none of them", tip=layout)
    if classes is None:
        if len(names) < 2:
            raise VolvelleError(f"{folder}: one class only, {names[0]}; nothing can be told apart", tip=layout)
        classes = names
    strange = [name for name in names if name not in classes]
    if strange:
        raise VolvelleError(
            f"{folder}: class {strange[0]} is not one of {', '.join(classes[:8])}{' …' if len(classes) > 8 else ''}"
        )
    good, skipped = check_images(files, on_bad=on_bad, source=folder)
    number = {name: label for label, name in enumerate(classes)}
    labels = [number[file.relative_to(folder).parts[0]] for file in good]
    missing = [name for name in names if number[name] not in set(labels)]
    if missing:
        raise VolvelleError(f"{folder}: no good picture is left in class {missing[0]}")
    return Labelled(Files(good), labels, tuple(classes), range(len(good)), tuple(skipped))


def _read_idx(folder: Path, classes: Sequence[str] | None) -> tuple[Labelled, Labelled]:
    train, test = read_idx_folder(folder)
    count = int(max(train[1].max(), test[1].max())) + 1
    names = tuple(FASHION_MNIST) if count == 10 and "fashion" in str(folder.resolve()).lower() else None
    if classes is not None and len(classes) != count:
        raise UsageError(f"{folder}: {count} classes, where {len(classes)} are wanted")
    chosen = tuple(classes) if classes is not None else names or tuple(str(number) for number in range(count))

    def labelled(images: Tensor, labels: Tensor, name: str) -> Labelled:
        return Labelled(Arrays(images, f"{folder}/{name}"), labels.tolist(), chosen, range(len(images)))

    return labelled(*train, "train"), labelled(*test, "t10k")
