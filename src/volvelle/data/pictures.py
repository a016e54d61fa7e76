"""Pictures to generate from: any folder becomes squares of one size, grey or in colour, with what is known about each.

| layout | what is known |
|---|---|
| FOLDER/a.jpg, FOLDER/deeper/b.png | nothing but the pictures |
| FOLDER/cat/1.jpg, FOLDER/dog/2.png | classes, when every picture lies in one of several folders |
| FOLDER/captions.jsonl, {"image": "a.jpg", "caption": "…"} a line | captions (also metadata.jsonl: file_name, text) |
| FOLDER/train/…, FOLDER/val/… of the first two kinds | which part is there to measure on |
| FOLDER/images/…, with masks or notes beside it | the pictures in images/ |
| FOLDER/train-images-idx3-ubyte.gz, … | classes, and which part is there to measure on |

Networks that generate take pixels in [-1, 1] (`to_signed`, `to_bytes`); what is read, drawn and stacked here are bytes.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from volvelle.data.idx import is_idx_folder
from volvelle.data.images import check_images, list_images, to_rgb, to_tensor
from volvelle.data.images_labelled import HELD, Files, Pictures, read_labelled, train_and_held
from volvelle.data.masks import IMAGES
from volvelle.data.text import Bad, OnBad
from volvelle.errors import UsageError, VolvelleError

Channels = Literal[1, 3]
LISTS = {"captions.jsonl": ("image", "caption"), "metadata.jsonl": ("file_name", "text")}
"""Files with captions: the fields of a line that hold the picture's path and the sentence."""
_LOOKS = 32
"""Pictures that are looked at to say what all are like."""


@dataclass(frozen=True)
class PictureSet:
    """Pictures, and of each its class or its caption where they are known; `order` says which of them count."""

    pictures: Pictures
    order: Sequence[int]
    labels: Sequence[int] | None = None
    classes: tuple[str, ...] = ()
    captions: Sequence[str] | None = None
    skipped: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Image.Image:
        return self.pictures[self.order[index]]

    def __str__(self) -> str:
        known = f" of {len(self.classes)} classes" if self.labels is not None else ""
        known += " with captions" if self.captions is not None else ""
        more = f", {len(self.skipped):,} left out" if self.skipped else ""
        return f"{len(self):,} pictures{known}{more}"

    def label(self, index: int) -> int:
        """The number of the picture's class; -1 where classes are not known."""
        return -1 if self.labels is None else self.labels[self.order[index]]

    def caption(self, index: int) -> str:
        """The picture's caption; empty where there are none."""
        return "" if self.captions is None else self.captions[self.order[index]]

    def source(self, index: int) -> str:
        """Where picture `index` comes from, for messages."""
        return self.pictures.source(self.order[index])

    def part(self, indices: Sequence[int]) -> PictureSet:
        """Some of the pictures."""
        return replace(self, order=[self.order[index] for index in indices], skipped=())

    def some(self) -> list[Image.Image]:
        """A few pictures, spread over the set."""
        return [self[index] for index in range(0, len(self), max(1, len(self) // _LOOKS))][:_LOOKS]

    @property
    def channels(self) -> Channels:
        """1 when the pictures looked at are all grey, else 3."""
        return 1 if all(is_grey(image) for image in self.some()) else 3

    @property
    def side(self) -> int:
        """The shorter side in pixels of the middle one of the pictures looked at."""
        sides = sorted(min(image.size) for image in self.some())
        return sides[len(sides) // 2]


@dataclass(frozen=True)
class Framing:
    """How a picture becomes a square: side in pixels, channels, and how far views to train on vary.

    `zoom` are the least and the greatest side of what a view shows, as a share of the picture's shorter side; `mirror`
    is the share of mirrored views.

    >>> Framing(4, 1).middle(Image.new("RGB", (9, 5), "white")).shape
    torch.Size([1, 4, 4])
    """

    size: int
    channels: Channels = 3
    zoom: tuple[float, float] = (1.0, 1.0)
    mirror: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.zoom
        if self.size < 1 or self.channels not in (1, 3) or not 0 < low <= high <= 1 or not 0 <= self.mirror <= 1:
            raise ValueError(
                f"Framing: size >= 1, 1 or 3 channels, 0 < zoom <= 1 and mirror in [0, 1] are wanted, got {self}"
            )

    def middle(self, image: Image.Image) -> Tensor:
        """The largest square in the middle, uint8 (c, size, size)."""
        side = min(image.size)
        return to_tensor(self._cut(image, (image.width - side) / 2, (image.height - side) / 2, side))

    def view(self, image: Image.Image, generator: random.Random) -> Tensor:
        """A square anywhere in the picture, uint8 (c, size, size)."""
        side = max(1.0, min(image.size) * generator.uniform(*self.zoom))
        left, top = generator.random() * (image.width - side), generator.random() * (image.height - side)
        square = self._cut(image, left, top, side)
        if generator.random() < self.mirror:
            square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(square)

    def _cut(self, image: Image.Image, left: float, top: float, side: float) -> Image.Image:
        """That square, resized; smaller pictures are enlarged. Cut and resized at once, so a strip costs no memory."""
        mode = "L" if self.channels == 1 else "RGB"
        picture = image if image.mode == mode else to_rgb(image).convert(mode)
        box = (left, top, min(left + side, picture.width), min(top + side, picture.height))
        return picture.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)


class Middles:
    """The middle of every picture, always the same: (uint8 (c, size, size), class or -1)."""

    def __init__(self, pictures: PictureSet, framing: Framing):
        self.pictures, self.framing = pictures, framing

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.framing.middle(self.pictures[index]), self.pictures.label(index)

    def source(self, index: int) -> str:
        """Where the picture comes from."""
        return self.pictures.source(index)


class Views(Middles):
    """Random views to train on; the loader gives `draw` a generator of (seed, epoch, picture)."""

    def draw(self, index: int, generator: random.Random) -> tuple[Tensor, int]:
        """A view of picture `index`, its chances taken from the generator."""
        return self.framing.view(self.pictures[index], generator), self.pictures.label(index)


def collate_pictures(items: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Stack samples: images uint8 (b, c, y, x) and labels int64 (b), -1 where classes are not known."""
    images, labels = zip(*items, strict=True)
    return {"images": torch.stack(images), "labels": torch.tensor(labels)}


def to_signed(pixels: Tensor) -> Tensor:
    """Bytes 0 … 255 as fp32 in [-1, 1].

    >>> to_signed(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([-1.,  1.])
    """
    return pixels.float().div_(127.5).sub_(1)


def to_bytes(pixels: Tensor) -> Tensor:
    """Undo `to_signed`: values in [-1, 1], and what lies beyond cut off, as uint8; NaN becomes grey.

    >>> to_bytes(torch.tensor([-1.0, 0.0, 3.0]))
    tensor([  0, 128, 255], dtype=torch.uint8)
    """
    return pixels.detach().float().add(1).mul(127.5).nan_to_num(127.5).clamp(0, 255).round().to(torch.uint8)


def is_grey(image: Image.Image) -> bool:
    """Whether all channels of all pixels are the same."""
    if image.mode in ("1", "L"):
        return True
    pixels = to_tensor(to_rgb(image))
    return bool((pixels == pixels[:1]).all())


def read_pictures(path: str | os.PathLike[str], *, on_bad: OnBad = "stop") -> tuple[PictureSet, PictureSet | None]:
    """Pictures to train on, and those to measure on where the folder has such a part (the table above).

    Raises UsageError where there is no such folder, VolvelleError for one without pictures, and for files that cannot
    be read, named with their reasons, unless `on_bad` is "skip" and some are good.
    """
    folder = Path(path)
    if folder.is_dir() and is_idx_folder(folder):
        train, test = read_labelled(folder)
        assert test is not None
        return tuple(PictureSet(s.pictures, s.order, s.labels, s.classes) for s in (train, test))  # pyright: ignore[reportReturnType]
    for name, fields in LISTS.items():
        if (folder / name).is_file():
            return _read_list(folder, name, fields, on_bad)
    root = next((folder / name for name in IMAGES if (folder / name).is_dir()), folder)
    parts = train_and_held(root)
    if parts is None:
        return _read_folder(root, on_bad, None), None
    found = _read_folder(parts[0], on_bad, None)
    return found, _read_folder(parts[1], on_bad, found.classes)


def _read_folder(folder: Path, on_bad: OnBad, classes: tuple[str, ...] | None) -> PictureSet:
    """All pictures below; `classes` are those of the part to train on, () where it has none."""
    files, skipped = check_images(list_images(folder), on_bad=on_bad, source=folder)
    names = [file.relative_to(folder).parts[0] if file.parent != folder else "" for file in files]
    found = tuple(sorted(set(names)))
    if classes is None:
        classes = found if "" not in found and len(found) > 1 else ()
    known = bool(classes) and set(found) <= set(classes)
    if classes and not known:
        strange = next(name for name in found if name not in classes)
        raise VolvelleError(f"{folder}: {strange or 'no folder'} is not one of the classes {', '.join(classes[:8])}")
    labels = [classes.index(name) for name in names] if known else None
    return PictureSet(Files(files), range(len(files)), labels, classes, None, tuple(skipped))


def _read_list(folder: Path, name: str, fields: tuple[str, str], on_bad: OnBad) -> tuple[PictureSet, PictureSet | None]:
    """The pictures that a list of captions names, parted by the folders train and val in their paths."""
    source = folder / name
    bad = Bad(source, on_bad)
    captions: dict[Path, str] = {}
    for number, line in enumerate(source.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            image, caption = (record[field] for field in fields)
        except (ValueError, TypeError, KeyError):
            bad.add(f"{source}:{number}", f"not a JSON object with {fields[0]} and {fields[1]}")
            continue
        if not isinstance(image, str) or not isinstance(caption, str):
            bad.add(f"{source}:{number}", f"{fields[0]} and {fields[1]} must be texts")
            continue
        captions[folder / image] = " ".join(caption.split())
    skipped = bad.finish(len(captions))
    if not captions:
        raise UsageError(f"{source}: names no picture", tip=f'wanted: {{"{fields[0]}": "a.jpg", "{fields[1]}": "…"}}')
    files, unread = check_images(list(captions), on_bad=on_bad, source=source)
    every = PictureSet(
        Files(files), range(len(files)), None, (), [captions[file] for file in files], (*skipped, *unread)
    )
    held = [i for i, file in enumerate(files) if {*file.relative_to(folder).parts[:-1]} & {*HELD}]
    if not held or len(held) == len(files):
        return every, None
    kept = sorted({*range(len(files))} - {*held})
    return replace(every, order=kept), every.part(held)
