"""Pictures with the masks of objects, for models that are asked by clicks and boxes.

| what the folder holds | objects |
|---|---|
| images and masks of class numbers (docs/segmentation.md: layouts) | connected pieces of each class |
| the same, with numbers=objects | one a number; 0 is the ground, 255 of an 8-bit mask is void |
| COCO's JSON with polygons or run lengths; FILE.json | one an annotation; crowds are void |
| sa_1.jpg + sa_1.json, … | SA-1B's files, one a picture, perhaps in train/, val/, test/, or in parts sa_000000/, … |

Pieces and annotations of less than `least` pixels are no objects, nor is a class that is called background. A mask of
nothing but 0 and 255 has one object, 255.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from volvelle.data.boxes import coco_files
from volvelle.data.boxes_coco import read_coco
from volvelle.data.boxes_notes import Note
from volvelle.data.coco_masks import MaskedObject, read_masks_of, read_segmentation
from volvelle.data.images import SUFFIXES, check_images, image_size, open_image, read_image
from volvelle.data.masks import SPLITS, find_pairs, read_mask, read_masks
from volvelle.data.masks_labels import VOID, Labels
from volvelle.data.promptable_objects import Listed, Objects, Pieces
from volvelle.data.run_lengths import RunLengths
from volvelle.data.text import OnBad
from volvelle.errors import UsageError, VolvelleError, did_you_mean

Numbers = Literal["classes", "objects"]
GROUND = "background"
_OUTLINE = re.compile(r'"segmentation"\s*:\s*(\{\s*"|\[\s*(\[\s*)?[-.\d])')
"""A segmentation with something in it: run lengths, polygons, or one polygon alone."""
Progress = Callable[[str, int, int], None]


class Marks(Protocol):
    """Where the objects of one picture are written."""

    def objects(self) -> Objects:
        """Read them. Raises VolvelleError that names the file."""
        ...


class Pictures(Protocol):
    """Pictures with objects, from files or not."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, Objects]: ...

    def source(self, index: int, /) -> str:
        """What the picture is called in messages."""
        ...


@dataclass(frozen=True)
class ObjectFolder:
    """Pictures of one split with the masks of their objects; item i is (upright RGB image, its `Objects`)."""

    folder: Path
    files: Sequence[Path]
    marks: Sequence[Marks]
    classes: tuple[str, ...]
    counts: Sequence[int]
    """How many objects each picture has."""
    skipped: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, Objects]:
        return read_image(self.files[index]), self.marks[index].objects()

    def __str__(self) -> str:
        more = f", {len(self.skipped)} left out" if self.skipped else ""
        objects = f"{sum(self.counts):,} objects of {len(self.classes)} classes"
        return f"{self.folder}: {len(self):,} pictures with masks of {objects}{more}"

    def source(self, index: int) -> str:
        """The picture's path."""
        return str(self.files[index])

    @property
    def parted(self) -> bool:
        """Whether every pixel has a class, or is void."""
        return all(isinstance(mark, ClassMap) for mark in self.marks)

    def part(self, indices: Sequence[int]) -> ObjectFolder:
        """Some of the pictures."""
        files, marks = ([values[i] for i in indices] for values in (self.files, self.marks))
        return replace(self, files=files, marks=marks, counts=[self.counts[i] for i in indices], skipped=())


def read_objects(
    path: str | Path,
    *,
    least: int = 1,
    numbers: Numbers = "classes",
    on_bad: OnBad = "stop",
    progress: Progress | None = None,
) -> dict[str, ObjectFolder]:
    """Find and check all pictures with masks of objects, by split ("train", "val", "test", or "").

    Raises UsageError for a path that is none, VolvelleError for one without masks, for a split without a single object,
    and for bad files; `on_bad="skip"` leaves pictures with bad files out.
    """
    splits = _read(Path(path), least, numbers, on_bad, progress or (lambda label, done, total: None))
    for split, found in splits.items():
        if not sum(found.counts):
            raise VolvelleError(
                f"{path}{f' ({split})' if split else ''}: not one object of {least} pixels or more in "
                f"{len(found):,} pictures with numbers={numbers}",
                tip="least=1 counts small ones too; 0 and a class called background are the ground, 255 is void; "
                "numbers=objects reads masks of object numbers, numbers=classes those of classes",
            )
    return splits


def _read(root: Path, least: int, numbers: Numbers, on_bad: OnBad, told: Progress) -> dict[str, ObjectFolder]:
    """The splits, with objects or without."""
    if root.is_file():
        if root.suffix.lower() != ".json":
            raise UsageError(f"{root}: a folder, or a JSON file of COCO's, is wanted")
        return {"": _coco(root, least, on_bad, told)}
    if not root.is_dir():
        beside = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise UsageError(f"{root}: no such folder", tip=did_you_mean(root.name, beside))
    single, files = _single_files(root), _outlined(root)
    if single:
        return {split: _singles(root, pairs, least, on_bad, told) for split, pairs in single.items()}
    if files:
        return {split: _coco(file, least, on_bad, told) for split, file in files.items()}
    try:
        splits = find_pairs(root)[1]
    except VolvelleError as error:
        raise VolvelleError(
            f"{root}: holds no pictures with masks of objects",
            tip="wanted: images/ and masks/, COCO's JSON with segmentations, or a.json beside a.jpg; docs/sam.md",
        ) from error
    read = _number_maps if numbers == "objects" else _class_maps
    return {split: read(root, split, least, on_bad, told) for split in splits}


def holds_masks(path: str | Path) -> bool:
    """Whether `read_objects` would find masks there, right or wrong ones."""
    root = Path(path)
    if root.is_file():
        return _has_outlines(root)
    if not root.is_dir():
        return False
    try:
        return bool(_single_files(root) or _outlined(root) or find_pairs(root)[1])
    except VolvelleError:
        return False


@dataclass(frozen=True)
class ClassMap:
    """A mask of class numbers."""

    path: Path
    labels: Labels
    least: int

    def objects(self) -> Pieces:
        """The connected pieces of its classes."""
        grounds = {number for number, name in enumerate(self.labels.names) if name.lower() == GROUND}
        return Pieces(read_mask(self.path, self.labels), self.least, grounds)


@dataclass(frozen=True)
class NumberMap:
    """A mask of object numbers: 8 or 16 bits, a palette, or a colour an object; 0 and black are the ground.

    255 of 8 bits is void, except where there is nothing but 0 and 255.
    """

    path: Path
    least: int

    def objects(self) -> Listed:
        """One object a number."""
        values = np.asarray(open_image(self.path))
        if values.ndim == 3 and values.shape[2] == 2:  # grey with transparency, which says nothing of objects
            values = values[..., 0]
        narrow = values.ndim == 2 and values.dtype == np.uint8
        if values.ndim == 3:
            values = (values[..., :3].astype(np.int32) << np.array([16, 8, 0])).sum(-1)
        present, counts = np.unique(values, return_counts=True)
        # Editors write a mask of one object as black and white.
        void = narrow and present.tolist() != [0, VOID]
        nothing = values == VOID if void else np.zeros(values.shape, dtype=bool)
        kept = [v for v, n in zip(present.tolist(), counts.tolist(), strict=True) if v and n >= self.least]
        masks = [RunLengths.of(values == v) for v in kept if not (void and v == VOID)]
        return Listed(masks, [0] * len(masks), nothing)


@dataclass(frozen=True)
class Outlines:
    """Annotations of a COCO file about one picture."""

    note: Note
    size: tuple[int, int]
    """(width, height)."""
    classes: tuple[str, ...]
    least: int

    def objects(self) -> Listed:
        """One object an annotation that is no crowd."""
        wide, high = self.size
        return _listed(read_masks_of(self.note, (high, wide)), (high, wide), self.classes, self.least)


@dataclass(frozen=True)
class SingleFile:
    """A JSON file about one picture, as SA-1B has them: {"image": {...}, "annotations": [{"segmentation", ...}]}."""

    path: Path
    least: int

    def objects(self) -> Listed:
        """One object an annotation."""
        content = _json(self.path)
        try:
            size = int(content["image"]["height"]), int(content["image"]["width"])
            records = [note["segmentation"] for note in content["annotations"]]
        except (KeyError, TypeError, ValueError) as error:
            raise VolvelleError(f"{self.path}: not SA-1B's format: {error} is missing or wrong") from error
        try:
            masks = [MaskedObject(read_segmentation(record, size)) for record in records]
        except VolvelleError as error:
            raise VolvelleError(f"{self.path}: {error}", tip=error.tip) from error
        return _listed(masks, size, ("object",), self.least)


def _listed(masks: Any, size: tuple[int, int], classes: tuple[str, ...], least: int) -> Listed:
    """Masks of `MaskedObject`s, those that are ignored as void."""
    nothing = np.zeros(size, dtype=bool)
    kept, labels = list[RunLengths](), list[int]()
    for one in masks:
        if one.ignored:
            nothing |= one.mask.mask()
        elif one.mask.area >= max(1, least):
            kept.append(one.mask)
            labels.append(classes.index(one.name))
    return Listed(kept, labels, nothing)


def _class_maps(root: Path, split: str, least: int, on_bad: OnBad, told: Progress) -> ObjectFolder:
    found = read_masks(
        root, split=split or None, on_bad=on_bad, progress=lambda done, total: told(f"checking {root}", done, total)
    )
    marks = [ClassMap(mask, found.labels, least) for _, mask in found.pairs]
    counts, label = list[int](), f"counting objects of {root}"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for count in pool.map(lambda mark: len(mark.objects()), marks):
            counts.append(count)
            told(label, len(counts), len(marks))
    return ObjectFolder(root, [image for image, _ in found.pairs], marks, found.labels.names, counts, found.skipped)


def _number_maps(root: Path, split: str, least: int, on_bad: OnBad, told: Progress) -> ObjectFolder:
    pairs, lonely = find_pairs(root)[1][split]
    marks: dict[Path, Marks] = {image: NumberMap(mask, least) for image, mask in pairs}
    return _checked(root, marks, ("object",), on_bad, told, lonely=lonely)


def _coco(file: Path, least: int, on_bad: OnBad, told: Progress) -> ObjectFolder:
    notes = read_coco(file, outlines=True)
    marks: dict[Path, Marks] = {}
    for note in notes.notes:
        size = note.size or (image_size(note.image) if note.image.is_file() else (1, 1))
        marks[note.image] = Outlines(note, size, notes.classes, least)
    return _checked(file, marks, notes.classes, on_bad, told, problems=notes.problems)


def _singles(root: Path, pairs: Sequence[tuple[Path, Path]], least: int, on_bad: OnBad, told: Progress) -> ObjectFolder:
    return _checked(root, {image: SingleFile(file, least) for image, file in pairs}, ("object",), on_bad, told)


def _checked(
    root: Path,
    marks: Mapping[Path, Marks],
    classes: tuple[str, ...],
    on_bad: OnBad,
    told: Progress,
    *,
    lonely: Sequence[Path] = (),
    problems: Sequence[tuple[str, str]] = (),
) -> ObjectFolder:
    """Every picture and its marks read once, its objects counted; bad ones are named or left out."""
    lock, counts = threading.Lock(), dict[Path, int]()
    if problems and on_bad == "stop":
        raise VolvelleError(f"{problems[0][0]}: {problems[0][1]}", tip="on_bad=skip leaves such objects out")

    def look(image: Path) -> None:
        if image not in marks:
            raise VolvelleError(f"{image}: has no mask")
        objects = marks[image].objects()
        size, shape = read_image(image).size, objects.void().shape
        if shape[::-1] != size:
            shown = [f"{wide} x {high}" for wide, high in (shape[::-1], size)]
            raise VolvelleError(f"{image}: its masks are {shown[0]} pixels, and it is {shown[1]}")
        with lock:
            counts[image] = len(objects)
            told(f"checking {root}", len(counts), len(marks))

    good, skipped = check_images([*marks, *lonely], on_bad=on_bad, source=root, look=look)
    lost = [f"{where}: {problem}" for where, problem in problems]
    kept = [marks[image] for image in good]
    return ObjectFolder(root, good, kept, classes, [counts[image] for image in good], [*lost, *skipped])


def _outlined(root: Path) -> dict[str, Path]:
    """COCO's files that hold masks, by split."""
    return {split: file for split, file in coco_files(root).items() if _has_outlines(file)}


def _has_outlines(file: Path) -> bool:
    """Whether a JSON file has a segmentation that is not empty; files of boxes often have `[]`. It is not parsed."""
    return _OUTLINE.search(_text(file)) is not None


def _single_files(root: Path) -> dict[str, list[tuple[Path, Path]]]:
    """Pictures with a JSON file of their own, by split."""
    folders = {split: root / word for split, words in SPLITS.items() for word in words if (root / word).is_dir()}
    found = {split: pairs for split, folder in folders.items() if (pairs := _singles_in(folder))}
    return found or {split: pairs for split, pairs in (("", _singles_in(root)),) if pairs}


def _singles_in(folder: Path) -> list[tuple[Path, Path]]:
    """Those of a folder; where it has none itself, of the folders in it, which is how SA-1B comes in parts."""
    parts = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    for places in ([folder], parts):
        pairs = [pair for place in places for pair in _beside(place)]
        if pairs and '"image"' in _text(pairs[0][1]):
            return pairs
    return []


def _beside(folder: Path) -> list[tuple[Path, Path]]:
    files = sorted(folder.glob("*.json"))
    pictures = {p.stem: p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES} if files else {}
    return [(pictures[file.stem], file) for file in files if file.stem in pictures]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VolvelleError(f"{path}: cannot be read ({error})") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise VolvelleError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
