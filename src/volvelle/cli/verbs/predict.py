"""`volvelle predict`: what is in a picture, and where, by a known classifier or a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from volvelle.cli.console import result
from volvelle.errors import UsageError
from volvelle.systems.segmentation.sam.options import EverythingOptions

EXAMPLES = (
    "volvelle predict efficientnet-lite0 photo.jpg",
    "volvelle predict runs/classify-1 photo.jpg other.png top=3",
    "volvelle predict runs/detect-1 photo.jpg score=0.5",
    "volvelle predict runs/vqgan-1 photo.jpg",
    "volvelle predict runs/promptable-1 photo.jpg points=120,80",
    "volvelle predict sam_vit_b.pth photo.jpg everything=true grid.points=16",
    "volvelle predict sam_vit_b.pth photo.jpg boxes=10,20,90,80 precision=bf16 segmentation=polygons",
)


@dataclass(frozen=True)
class Options:
    """Who looks, and at what."""

    model: Positional[str]
    """A known image model (efficientnet-lite0), a run, a network's folder, or a checkpoint of Segment Anything's."""
    images: Positional[tuple[str, ...]]
    """Pictures, one or more."""
    top: int = 5
    """Classes to print for each picture."""
    out: str = "predictions"
    """Segmenters, detectors, promptable models, codecs: the folder for masks, overlays, boxes, reconstructions."""
    score: float | None = None
    """Detectors: the least score of a box; None: the one that was best on the pictures the run set aside."""
    points: str = ""
    """Promptable models: x,y of a point on an object, more of them behind; a ; before the next object."""
    labels: str = ""
    """What the points are, as many as there are: 1 the object, 0 not the object; all are 1 when absent."""
    boxes: str = ""
    """Promptable models: x1,y1,x2,y2 around an object; more of them behind."""
    everything: bool = False
    """Promptable models: find all objects instead, by a grid of points."""
    grid: EverythingOptions = field(default_factory=EverythingOptions)
    memory: float | None = None
    """Everything: the most memory, in GB, beside the model and the picture; None: as much as is fastest."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Promptable models: what the image encoder computes in; bf16 is faster where the hardware has it."""
    device: str = "cpu"
    """Promptable models: cpu, cuda, or cuda:1."""
    segmentation: Literal["rle", "polygons"] = "rle"
    """Promptable models: masks as run lengths, or as polygons, which more tools read; both hold them exactly."""


def main(options: Options) -> int:
    """Print the likeliest classes of every picture; a segmenter writes masks and overlays, a detector draws boxes.

    A promptable model answers points and boxes, or finds everything: overlays, and masks in COCO's JSON.
    """
    from volvelle.cli import classifying, coding, detecting, pointing, prompting, segmenting

    if options.top < 1:
        raise UsageError(f"top: must be at least 1, got {options.top}")
    if not options.images:
        raise UsageError("predict: no picture", tip=f"volvelle predict {options.model} photo.jpg")
    files, out = [Path(image) for image in options.images], Path(options.out)
    asked = pointing.read_prompts(options.points, options.labels, options.boxes)
    if options.everything and (asked.points or asked.boxes):
        raise UsageError("predict: everything=true asks by itself", tip="leave out points and boxes, or everything")
    promptable = bool(options.everything or asked.points or asked.boxes or prompting.is_promptable(options.model))
    _check(options, promptable)
    if promptable:
        grid = options.grid if options.everything else None
        how = pointing.How(options.memory, options.precision, options.device, options.segmentation)
        images = pointing.predict(options.model, files, out, asked, grid, how)
    elif coding.is_codec(options.model):
        images = coding.predict(options.model, files, out)
    elif detecting.is_detection(options.model):
        images = detecting.predict(Path(options.model), files, out, score=options.score)
    elif segmenting.is_segmentation(options.model):
        images = segmenting.predict(Path(options.model), files, out)
    else:
        return classifying.predict(options.model, options.images, top=options.top)
    result({"model": options.model, "images": images})
    return 0


def _check(options: Options, promptable: bool) -> None:
    """UsageError for words that would have no effect."""
    usual = Options(options.model, options.images)
    if not options.everything:
        told = [name for name in ("grid", "memory") if getattr(options, name) != getattr(usual, name)]
        if told:
            raise UsageError(f"{' and '.join(told)}: only of use with everything=true", tip="everything=true")
    told = [name for name in ("precision", "device", "segmentation") if getattr(options, name) != getattr(usual, name)]
    if told and not promptable:
        raise UsageError(f"{' and '.join(told)}: for promptable models, which {options.model} is not")
