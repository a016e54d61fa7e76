"""Masks in COCO's JSON: polygons and run lengths read, run lengths written, with what a mask generator knows of each.

    annotation = {..., "bbox": [x, y, width, height], "area", "segmentation": polygons | {"size", "counts"}}

Written are compressed run lengths, which hold any mask exactly, or polygons for tools that want them. SA-1B's files
have one picture each, {"image": {...}, "annotations": [...]}, with annotations of the same form.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from volvelle.data.boxes_coco import coco_document, read_coco
from volvelle.data.boxes_notes import Note, Object
from volvelle.data.polygons import fill_polygons, trace_polygons
from volvelle.data.run_lengths import RunLengths
from volvelle.errors import VolvelleError
from volvelle.files import write_atomic

Segmentation = Literal["rle", "polygons"]
"""What a mask is written as."""


@dataclass(frozen=True)
class MaskedObject:
    """One object of a picture: its mask, its class, whether it is ignored, and further facts for its annotation.

    A generator's facts are predicted_iou, stability_score, point_coords and crop_box, as in SA-1B.
    """

    mask: RunLengths
    name: str = "object"
    ignored: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


def read_segmentation(record: Any, size: tuple[int, int]) -> RunLengths:
    """The mask that a `segmentation` means in a picture of `size` (height, width): polygons, or run lengths.

    Raises VolvelleError for anything else, and for run lengths of another size.

    >>> read_segmentation([[0, 0, 2, 0, 2, 2, 0, 2]], (2, 3)).area
    4
    """
    if isinstance(record, Mapping):
        found = RunLengths.from_coco(record)
        if found.size != tuple(size):
            raise VolvelleError(
                f"segmentation: of {found.size[1]} x {found.size[0]} pixels, in a picture of {size[1]} x {size[0]}"
            )
        return found
    if isinstance(record, Sequence) and not isinstance(record, str) and record:
        # One polygon alone, without a list around it, is what some tools write.
        return fill_polygons(record if isinstance(record[0], Sequence) else [record], size)
    raise VolvelleError(f"segmentation: polygons or run lengths are wanted, got {str(record)[:60]}")


def read_masks_of(note: Note, size: tuple[int, int]) -> Iterator[MaskedObject]:
    """The objects of a picture of `read_coco(path, outlines=True)`, one by one, each with its mask.

    An object without a segmentation is left out. Errors name the annotation.
    """
    for one in note.objects:
        if one.outline:
            try:
                yield MaskedObject(read_segmentation(one.outline, size), one.name, one.ignored)
            except VolvelleError as error:
                raise VolvelleError(f"{one.where}: {error}", tip=error.tip) from error


def coco_masks_document(
    images: Iterable[tuple[str, tuple[int, int]]],
    objects: Iterable[Sequence[MaskedObject]],
    classes: Sequence[str] = ("object",),
    segmentation: Segmentation = "rle",
) -> dict[str, Any]:
    """COCO's three lists: `images` are (file name, (width, height)), `objects` those of each, categories count from 1.

    >>> one = MaskedObject(fill_polygons([[1, 0, 3, 0, 3, 2, 1, 2]], (3, 4)), facts={"predicted_iou": 0.9})
    >>> note, = coco_masks_document([("a.png", (4, 3))], [[one]])["annotations"]
    >>> note["bbox"], note["area"], note["segmentation"], note["predicted_iou"]
    ([1, 0, 2, 2], 4, {'size': [3, 4], 'counts': '32103'}, 0.9)
    """
    inside = [list(some) for some in objects]
    boxes = [[Object(one.name, one.mask.box, "", one.ignored, one.mask.area) for one in some] for some in inside]
    document = coco_document(images, boxes, classes)
    for note, one in zip(document["annotations"], (one for some in inside for one in some), strict=True):
        note["segmentation"] = one.mask.to_coco() if segmentation == "rle" else trace_polygons(one.mask)
        note.update(one.facts)
    return document


def write_coco_masks(
    path: Path,
    images: Iterable[tuple[str, tuple[int, int]]],
    objects: Iterable[Sequence[MaskedObject]],
    classes: Sequence[str] = ("object",),
    segmentation: Segmentation = "rle",
) -> None:
    """Write such a document as a file."""
    write_atomic(path, json.dumps(coco_masks_document(images, objects, classes, segmentation)))


def read_coco_masks(path: Path) -> list[tuple[Path, tuple[int, int], list[MaskedObject]]]:
    """What `write_coco_masks` wrote, or another file of COCO's: of each picture its file, (width, height) and objects.

    The size is the file's own, else the picture's. Raises VolvelleError that names the annotation.
    """
    from volvelle.data.images import image_size

    found = []
    notes = read_coco(path, outlines=True)
    for where, problem in notes.problems:
        raise VolvelleError(f"{where}: {problem}")
    for note in notes.notes:
        wide, high = note.size or image_size(note.image)
        found.append((note.image, (wide, high), list(read_masks_of(note, (high, wide)))))
    return found
