"""Pictures with boxes: VOC's folders of XML and COCO's JSON, checked against the pictures before anything is trained.

| layout | what it is |
|---|---|
| JPEGImages/ + Annotations/, lists in ImageSets/Main/train.txt, … | VOC; also images/ + annotations/, with no lists |
| train.json, val.json, or annotations/instances_train2017.json | COCO; pictures in images/, images/train/, train2017/ |
| train/_annotations.coco.json beside the pictures, valid/ | COCO, as exported by labelling services |
| a.jpg + a.xml side by side, perhaps in train/, valid/, test/ | VOC, as labelling programs save it |
| FILE.json | one split of COCO |

Boxes are corners x1 y1 x2 y2 in pixels. Crowds and difficult objects are kept as `ignored`: neither to be found nor to
be taken for background. What is wrong with a box is listed and mended: corners in the wrong order are exchanged, what
lies outside the picture is cut off, and a box that has no area then is left out.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from volvelle.data.boxes_coco import coco_document, is_coco, read_coco
from volvelle.data.boxes_notes import Note, Notes, Object
from volvelle.data.boxes_voc import filename, read_note
from volvelle.data.images import DECODED, SUFFIXES, check_images, image_size, read_image
from volvelle.data.masks import SPLITS
from volvelle.data.text import Bad, OnBad
from volvelle.errors import UsageError, VolvelleError, did_you_mean
from volvelle.files import write_atomic

IMAGES, XML = ("JPEGImages", "images", "image", "imgs"), ("Annotations", "annotations", "labels", "xml")


@dataclass(frozen=True)
class Boxes:
    """The objects of one picture: corners (k, 4) fp32, labels (k,) int64, ignored (k,) bool, areas (k,) fp32."""

    corners: Tensor
    labels: Tensor
    ignored: Tensor
    areas: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class BoxFolder:
    """Pictures with boxes of one split, their sizes, the classes, what was mended, and which pictures are left out.

    Item i is (upright RGB image, its `Boxes`).
    """

    folder: Path
    files: Sequence[Path]
    boxes: Sequence[Boxes]
    sizes: Sequence[tuple[int, int]]
    """(width, height) of each."""
    classes: tuple[str, ...]
    remarks: Sequence[str] = ()
    skipped: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, Boxes]:
        return read_image(self.files[index]), self.boxes[index]

    def __str__(self) -> str:
        more = f", {len(self.skipped)} left out" if self.skipped else ""
        total = sum(self.counts)
        return f"{self.folder}: {len(self):,} pictures with {total:,} boxes of {len(self.classes)} classes{more}"

    def source(self, index: int) -> str:
        """The picture's path."""
        return str(self.files[index])

    def part(self, indices: Sequence[int]) -> BoxFolder:
        """Some of the pictures."""
        files, boxes, sizes = ([values[i] for i in indices] for values in (self.files, self.boxes, self.sizes))
        return replace(self, files=files, boxes=boxes, sizes=sizes, remarks=(), skipped=())

    @property
    def counts(self) -> list[int]:
        """Boxes of each class that are to be found."""
        found = Counter(chain.from_iterable(b.labels[~b.ignored].tolist() for b in self.boxes))
        return [found[number] for number in range(len(self.classes))]


def read_boxes(
    path: str | Path,
    *,
    classes: Sequence[str] = (),
    on_bad: OnBad = "stop",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, BoxFolder]:
    """Find and check all pictures with boxes of a folder or a JSON file, by split ("train", "val", "test", or "").

    Every picture is decoded once. Unreadable ones, pictures of another size than their annotation says, pictures
    without an annotation, and unknown classes are named with file and line; `on_bad="skip"` leaves such pictures out.
    Classes are `classes` (those of a trained model), else COCO's categories that have a box, by their id, or the names
    in the XML files of all splits, by the alphabet.

    Raises UsageError for a path that is none, VolvelleError for one without annotations and for bad files.
    """
    root = Path(path)
    splits = find_notes(root)
    known = tuple(classes) or _classes(splits)
    total, done = sum(len(found.notes) for found in splits.values()), 0
    folders = {}
    for split, found in splits.items():
        begun = done

        def count(number: int, begun: int = begun) -> None:
            if progress:
                progress(begun + number, total)

        folders[split] = _checked(root, found, known, on_bad, count)
        done += len(found.notes)
    return folders


def find_notes(root: Path) -> dict[str, Notes]:
    """What a folder or file says of its pictures, by split. Raises UsageError and VolvelleError as `read_boxes`."""
    if root.is_file():
        if root.suffix.lower() != ".json":
            raise UsageError(f"{root}: a folder, or a JSON file of COCO's, is wanted")
        return {"": read_coco(root)}
    if not root.is_dir():
        beside = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise UsageError(f"{root}: no such folder", tip=did_you_mean(root.name, beside))
    for find in (_voc, _coco, _beside):
        found = {name: notes for name, notes in find(root).items() if notes.notes}
        if found:
            return found
    raise VolvelleError(
        f"{root}: holds no pictures with boxes",
        tip="wanted: JPEGImages/ and Annotations/ (VOC), train.json (COCO), or a.xml beside a.jpg; docs/detection.md",
    )


def write_coco(folder: BoxFolder, path: Path) -> Path:
    """Write the boxes of a split as COCO's JSON; pictures are named by their paths from the file's folder on."""
    base = path.parent.resolve()
    names = [Path(os.path.relpath(file.resolve(), base)).as_posix() for file in folder.files]
    objects = [_objects(boxes, folder.classes) for boxes in folder.boxes]
    images = zip(names, folder.sizes, strict=True)
    write_atomic(path, json.dumps(coco_document(images, objects, folder.classes)))
    return path


def _objects(boxes: Boxes, classes: Sequence[str]) -> list[Object]:
    objects = []
    for number, (x1, y1, x2, y2) in enumerate(boxes.corners.tolist()):
        name, ignored, area = classes[int(boxes.labels[number])], bool(boxes.ignored[number]), boxes.areas[number]
        objects.append(Object(name, (x1, y1, x2, y2), "", ignored, float(area)))
    return objects


def _classes(splits: Mapping[str, Notes]) -> tuple[str, ...]:
    """The names that occur, in the order of the file that lists them, else by the alphabet."""
    used = {one.name for found in splits.values() for note in found.notes for one in note.objects}
    listed = dict.fromkeys(name for found in splits.values() for name in found.classes)
    names = tuple(name for name in listed if name in used) or tuple(sorted(used))
    if not names:
        problems = (note.problem for found in splits.values() for note in found.notes if note.problem)
        raise VolvelleError(next(problems, "no picture has a box, so there is nothing to learn"))
    return names


def _checked(
    root: Path, found: Notes, classes: tuple[str, ...], on_bad: OnBad, count: Callable[[int], None]
) -> BoxFolder:
    bad = Bad(root, on_bad)
    for where, problem in found.problems:
        bad.add(where, problem)
    lost = bad.finish(len(found.notes))
    notes = {note.image: note for note in found.notes}
    if len(notes) < len(found.notes):
        twice = next(path for path, times in Counter(note.image for note in found.notes).items() if times > 1)
        raise VolvelleError(f"{root}: {twice} is listed more than once")
    scan = _Scan(notes, classes, count)
    good, skipped = check_images(list(notes), on_bad=on_bad, source=root, look=scan)
    remarks = [remark for image in good for remark in scan.remarks[image]]
    boxes, sizes = [scan.boxes[image] for image in good], [scan.sizes[image] for image in good]
    return BoxFolder(root, good, boxes, sizes, classes, remarks, [*lost, *skipped])


class _Scan:
    """Looks at one picture and its note, and keeps its boxes and what was mended in them."""

    def __init__(self, notes: Mapping[Path, Note], classes: Sequence[str], count: Callable[[int], None]):
        self.notes, self.count = notes, count
        self.numbers = {name: number for number, name in enumerate(classes)}
        self.boxes: dict[Path, Boxes] = {}
        self.sizes: dict[Path, tuple[int, int]] = {}
        self.remarks: dict[Path, list[str]] = {}
        self.lock = threading.Lock()

    def __call__(self, image: Path) -> None:
        """Raise VolvelleError with what is wrong."""
        note = self.notes[image]
        if note.problem is not None:
            raise VolvelleError(note.problem)
        if not image.is_file():
            raise VolvelleError(f"{note.where}: its picture {image} is missing")
        size = read_image(image).size if len(self.notes) <= DECODED else image_size(image)
        if note.size is not None and note.size != size:
            shown = [f"{wide} x {high}" for wide, high in (note.size, size)]
            raise VolvelleError(f"{note.where}: is about a picture of {shown[0]}, and this one is {shown[1]}")
        remarks = list[str]()
        rows = [row for row in (self._row(one, size, remarks) for one in note.objects) if row is not None]
        corners = torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4)
        boxes = Boxes(
            corners,
            torch.tensor([row[1] for row in rows], dtype=torch.int64),
            torch.tensor([row[2] for row in rows], dtype=torch.bool),
            torch.tensor([row[3] for row in rows], dtype=torch.float32),
        )
        with self.lock:
            self.boxes[image], self.sizes[image], self.remarks[image] = boxes, size, remarks
            self.count(len(self.boxes))

    def _row(
        self, one: Object, size: tuple[int, int], remarks: list[str]
    ) -> tuple[list[float], int, bool, float] | None:
        """Corners, label, ignored and area of a box as it should be; None when nothing is left of it."""
        if one.name not in self.numbers:
            known = ", ".join(list(self.numbers)[:10])
            tip = did_you_mean(one.name, self.numbers) or f"known: {known}"
            raise VolvelleError(f"{one.where}: unknown class {one.name!r} ({tip})")
        named = f"{one.where}: {one.name} {','.join(f'{value:g}' for value in one.box)}"
        x1, y1, x2, y2 = one.box
        if x1 > x2 or y1 > y2:
            remarks.append(f"{named}: corners exchanged")
            x1, y1, x2, y2 = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
        wide, high = size
        if min(x1, y1) < -1 or x2 > wide + 1 or y2 > high + 1:
            remarks.append(f"{named}: cut off at the edges of the picture, {wide} x {high}")
        x1, x2 = (min(max(x, 0.0), float(wide)) for x in (x1, x2))
        y1, y2 = (min(max(y, 0.0), float(high)) for y in (y1, y2))
        area = (x2 - x1) * (y2 - y1)
        if area <= 0:
            remarks.append(f"{named}: has no area, left out")
            return None
        return [x1, y1, x2, y2], self.numbers[one.name], one.ignored, area if one.area is None else one.area


def _pictures(folder: Path) -> dict[str, Path]:
    """The images of a folder and those in it by their paths without ending."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    return {p.relative_to(folder).with_suffix("").as_posix(): p for p in found}


def _noted(names: Sequence[str], xml: Path, images: Path, pictures: Mapping[str, Path]) -> Notes:
    """The notes of these pictures (paths without ending); one that has no XML file is a problem."""
    notes = []
    for name in names:
        file, picture = xml / f"{name}.xml", pictures.get(name)
        if not file.is_file():
            shown = picture or images / name
            notes.append(Note(shown, str(file), problem=f"has no annotation {file}"))
            continue
        if picture is None:
            called = filename(file)
            picture = pictures.get(Path(called).stem) if called else None
            picture = picture or images / (Path(called).name if called else f"{name}.jpg")
        notes.append(read_note(file, picture))
    return Notes(notes)


def _voc(root: Path) -> dict[str, Notes]:
    pairs = [(root / a, root / b) for a in IMAGES for b in XML if (root / a).is_dir() and (root / b).is_dir()]
    pairs = [(images, xml) for images, xml in pairs if next(xml.rglob("*.xml"), None)]
    if not pairs:
        return {}
    images, xml = pairs[0]
    pictures, lists = _pictures(images), root / "ImageSets" / "Main"
    found = {}
    for split in SPLITS:
        if (lists / f"{split}.txt").is_file():
            lines = (lists / f"{split}.txt").read_text(encoding="utf-8").splitlines()
            names = [line.split()[0] for line in lines if line.strip()]
            found[split] = _noted([_stem(name) for name in names], xml, images, pictures)
    if found:
        return found
    for split, folders in SPLITS.items():
        for part in folders:
            if (images / part).is_dir() and (xml / part).is_dir():
                found[split] = _all(images / part, xml / part)
    return found or {"": _all(images, xml)}


def _all(images: Path, xml: Path) -> Notes:
    """Every picture and every XML file of two folders."""
    pictures = _pictures(images)
    written = [p.relative_to(xml).with_suffix("").as_posix() for p in sorted(xml.rglob("*.xml"))]
    noted = _noted(written, xml, images, pictures).notes
    named = {note.image for note in noted}
    alone = [name for name, picture in pictures.items() if picture not in named]
    return Notes([*noted, *_noted(alone, xml, images, pictures).notes])


def coco_files(root: Path) -> dict[str, Path]:
    """The files of COCO's in a folder, by split; "" is the split of one alone that names none."""
    files = [*sorted(root.glob("*.json")), *sorted((root / "annotations").glob("*.json"))]
    found = {}
    for split, words in SPLITS.items():
        inside = [file for word in words for file in sorted((root / word).glob("*.json"))]
        named = [file for file in files if any(word in re.split("[^a-z]+", file.stem.lower()) for word in words)]
        chosen = next((file for file in (*named, *inside) if is_coco(file)), None)
        if chosen is not None:
            found[split] = chosen
    alone = next((file for file in files if is_coco(file)), None) if not found else None
    return {"": alone} if alone is not None else found


def _coco(root: Path) -> dict[str, Notes]:
    return {split: read_coco(file) for split, file in coco_files(root).items()}


def _beside(root: Path) -> dict[str, Notes]:
    found = {}
    for split, folders in SPLITS.items():
        for part in (root / folder for folder in folders):
            if part.is_dir() and next(part.glob("*.xml"), None):
                found[split] = _all(part, part)
    return found or ({"": _all(root, root)} if next(root.glob("*.xml"), None) else {})


def _stem(name: str) -> str:
    """A name of a list without the ending that some lists have."""
    return name.rpartition(".")[0] if Path(name).suffix.lower() in SUFFIXES else name
