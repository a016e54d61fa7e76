"""What `predict` does with a promptable model: masks for points and boxes, or for everything in a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from volvelle.cli.console import duration, progress, say
from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.segmentation.sam.options import EverythingOptions

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from volvelle.data.coco_masks import MaskedObject, Segmentation
    from volvelle.systems.segmentation.sam.promptable import Promptable

SHOWN = 1 << 24
"""Pixels of the largest overlay; of larger pictures every second, third … pixel is drawn."""
COLOURS = 254


@dataclass(frozen=True)
class Asked:
    """Prompts as they were typed: of each object its points, with labels, and its box; any of these may be absent."""

    points: list[list[list[float]]]
    labels: list[list[int]]
    boxes: list[list[float]]


def read_prompts(points: str, labels: str, boxes: str) -> Asked:
    """Read what was typed: `;` between objects, `,` between numbers. UsageError says what does not fit.

    >>> read_prompts("120,80,130,95;7,9", "1,0;1", "")
    Asked(points=[[[120.0, 80.0], [130.0, 95.0]], [[7.0, 9.0]]], labels=[[1, 0], [1]], boxes=[])
    >>> read_prompts("", "", "1,2,3,4,5,6,7,8").boxes
    [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]
    """
    at = [_groups(row, 2, "points", "x,y in turn") for row in _rows(points, "points")]
    what = [_labels(row) for row in _rows(labels, "labels")] if labels else [[1] * len(row) for row in at]
    around = [box for row in _rows(boxes, "boxes") for box in _groups(row, 4, "boxes", "x1,y1,x2,y2 in turn")]
    if [len(row) for row in what] != [len(row) for row in at]:
        told = f"{_counted(at)} points, {_counted(what)} labels"
        raise UsageError(f"labels: one for each point is wanted, got {told}", tip="1 is the object, 0 is not")
    if at and around and len(at) != len(around):
        raise UsageError(f"boxes: {len(around)} boxes and points of {len(at)} objects", tip="one box for each object")
    return Asked(at, what, around)


@dataclass(frozen=True)
class How:
    """In what it is computed, and what is written: `memory` in GB, of the search for everything; None: as it comes."""

    memory: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "cpu"
    segmentation: Segmentation = "rle"

    def __post_init__(self) -> None:
        if self.memory is not None and not self.memory > 0:
            raise UsageError(f"memory: must be above 0 GB, got {self.memory}")


def predict(
    model: str, images: Sequence[Path], out: Path, asked: Asked, grid: EverythingOptions | None, how: How
) -> list[dict[str, Any]]:
    """Write STEM-overlay.png and STEM-masks.json (COCO's) into `out` for every picture, and say what was found.

    With `grid` everything is looked for, else what was `asked`.
    """
    from volvelle.cli.segmenting import free_name
    from volvelle.data.coco_masks import write_coco_masks
    from volvelle.systems.segmentation.sam.pictures import open_picture
    from volvelle.train.segment_pictures import png

    if grid is None and not asked.points and not asked.boxes:
        tip = f"volvelle predict {model} {images[0]} points=120,80, boxes=10,20,90,80 or everything=true"
        raise UsageError("predict: a promptable model wants to be asked", tip=tip)
    promptable = _opened(model, how)
    pictures = [(path, open_picture(path)) for path in images]  # before any is written
    if grid is None:
        for path, picture in pictures:
            _check_asked(path, picture, asked)
    out.mkdir(parents=True, exist_ok=True)
    records = list[dict[str, Any]]()
    for path, picture in pictures:
        if grid is None:
            objects, size = _answers(promptable, picture, asked)
        else:
            objects, size = _everything(promptable, picture, grid, how.memory)
        file = free_name(out, path, "overlay", records)
        notes = file.with_name(file.name.removesuffix("overlay.png") + "masks.json")
        file.write_bytes(png(_overlay(picture, size, objects, asked if grid is None else None)))
        name = Path(os.path.relpath(path.resolve(), out.resolve())).as_posix()
        write_coco_masks(notes, [(name, (size[1], size[0]))], [objects], segmentation=how.segmentation)
        say(f"{path}: {len(objects):,} masks", *_told(objects), f"  overlay  {file}", f"  masks    {notes}")
        if not objects:
            say("  none was sure and stable enough; lower grid.iou or grid.stability")
        records.append({"image": str(path), "overlay": str(file), "masks": str(notes), "objects": _facts(objects)})
    return records


def _opened(model: str, how: How) -> Promptable:
    """The model, where and in what it is to compute."""
    import torch

    from volvelle.cli.prompting import is_promptable, open_promptable
    from volvelle.systems.segmentation.sam.load import load_sam
    from volvelle.systems.segmentation.sam.promptable import Promptable
    from volvelle.train.text_run import choose_device

    device, _ = choose_device(how.device)
    net = open_promptable(Path(model)) if is_promptable(model) else load_sam(model)
    return Promptable(net.to(device), dtype=torch.bfloat16 if how.precision == "bf16" else None)


def _check_asked(path: Path, picture: Image.Image, asked: Asked) -> None:
    """VolvelleError for a prompt that lies outside this picture, before any is embedded."""
    from volvelle.systems.segmentation.sam.pictures import upright_size
    from volvelle.systems.segmentation.sam.prompts import check

    try:
        check(upright_size(picture), asked.points or None, asked.labels or None, asked.boxes or None)
    except VolvelleError as error:
        raise VolvelleError(f"{path}: {error}", tip=error.tip) from error


def _answers(promptable: Promptable, picture: Image.Image, asked: Asked) -> tuple[list[MaskedObject], tuple[int, int]]:
    """The best mask of each object that was asked for, and the picture's (height, width)."""
    import torch

    from volvelle.systems.segmentation.sam.objects import objects_at

    with torch.no_grad():
        embedding = promptable.embed(picture)
    return objects_at(promptable, embedding, asked.points, asked.labels, asked.boxes), embedding.original


def _everything(
    promptable: Promptable, picture: Image.Image, grid: EverythingOptions, memory: float | None
) -> tuple[list[MaskedObject], tuple[int, int]]:
    """All masks, and the picture's (height, width)."""
    from volvelle.systems.segmentation.sam.crops import crops
    from volvelle.systems.segmentation.sam.pictures import upright_size

    total = sum(crop.points**2 for crop in crops(upright_size(picture), grid))
    with progress("everything", total, unit="points") as bar:
        found = promptable.everything(
            picture,
            options=grid,
            max_memory=None if memory is None else int(memory * 1e9),
            progress=lambda done, total: bar.update(done),
        )
    took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.seconds.items() if seconds)
    say(f"{total:,} points in {duration(sum(found.seconds.values()))}: {took}")
    return [one.annotated() for one in found.masks], found.size


def _overlay(
    picture: Image.Image, size: tuple[int, int], objects: Sequence[MaskedObject], asked: Asked | None
) -> Image.Image:
    """The picture with its masks in colours, small ones on top, outlines in full colour; points and boxes drawn."""
    import numpy as np
    from PIL import Image

    from volvelle.data.masks_labels import VOID, voc_colour
    from volvelle.data.promptable_clicks import Click
    from volvelle.systems.segmentation.sam.pictures import shrunk
    from volvelle.train.detect_pictures import Drawn, draw_boxes
    from volvelle.train.promptable_pictures import with_clicks
    from volvelle.train.segment_pictures import overlay, painted

    step = math.ceil(math.sqrt(size[0] * size[1] / SHOWN))
    ground = shrunk(picture, size, step)
    colours = [voc_colour(number + 1) for number in range(COLOURS)]
    seen = np.full((ground.height, ground.width), VOID, dtype=np.uint8)
    for number, one in sorted(enumerate(objects), key=lambda pair: -pair[1].mask.area):
        mask = one.mask.thinned(step)
        seen[mask] = number % COLOURS
    shown = np.array(overlay(ground, seen, colours))
    rim = _rim(seen) & (seen != VOID)
    shown[rim] = painted(seen, colours)[rim]
    drawn = Image.fromarray(shown)
    if asked is None:
        return drawn
    boxes = [Drawn((x1 / step, y1 / step, x2 / step, y2 / step), (255, 176, 32)) for x1, y1, x2, y2 in asked.boxes]
    clicks = [
        Click(round(x / step), round(y / step), label)
        for row, labels in zip(asked.points, asked.labels, strict=True)
        for (x, y), label in zip(row, labels, strict=True)
    ]
    return with_clicks(draw_boxes(drawn, boxes), clicks)


def _rim(seen: np.ndarray) -> np.ndarray:
    """Where a pixel differs from the one right of it or below it, on both sides."""
    import numpy as np

    rim = np.zeros(seen.shape, dtype=bool)
    beside, below = seen[:, 1:] != seen[:, :-1], seen[1:] != seen[:-1]
    rim[:, 1:] |= beside
    rim[:, :-1] |= beside
    rim[1:] |= below
    rim[:-1] |= below
    return rim


def _facts(objects: Sequence[MaskedObject]) -> list[dict[str, Any]]:
    return [{"area": one.mask.area, "box": list(one.mask.box), **one.facts} for one in objects]


def _told(objects: Sequence[MaskedObject]) -> list[str]:
    """A line for each of the first few masks."""
    lines = []
    for one in objects[:5]:
        x1, y1, x2, y2 = one.mask.box
        sure = one.facts["predicted_iou"]
        lines.append(f"  {one.mask.area:,} pixels in {x1},{y1},{x2},{y2}, IoU estimated {sure:.2f}")
    return lines


def _labels(row: list[float]) -> list[int]:
    if not all(one in (0, 1) for one in row):
        wrong = next(one for one in row if one not in (0, 1))
        raise UsageError(f"labels: 1 or 0 is wanted for each point, got {wrong:g}", tip="1 is the object, 0 is not")
    return [int(one) for one in row]


def _rows(text: str, name: str) -> list[list[float]]:
    """The numbers of each object."""
    rows = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        try:
            rows.append([_finite(number) for number in part.split(",") if number.strip()])
        except ValueError:
            raise UsageError(
                f"{name}: numbers are wanted, got {part!r}", tip='points=120,80 or points="1,2;3,4"'
            ) from None
    return rows


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _groups(numbers: list[float], size: int, name: str, wanted: str) -> list[list[float]]:
    if not numbers or len(numbers) % size:
        raise UsageError(f"{name}: {wanted} are wanted, got {len(numbers)} numbers")
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _counted(rows: Sequence[Sequence[Any]]) -> str:
    return " and ".join(str(len(row)) for row in rows) or "no"
