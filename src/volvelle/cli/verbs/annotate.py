"""`volvelle annotate`: masks for your pictures, made by a promptable model and you, for the next training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

EXAMPLES = (
    "volvelle annotate runs/promptable-1 data=photos",
    "volvelle annotate runs/promptable-1 data=photos step=automatic iou=0.8 out=photos/found.json",
)


@dataclass(frozen=True)
class Options:
    """Who answers, on which pictures, and how much of it alone."""

    model: Positional[str]
    """A run of train promptable, or a checkpoint of Segment Anything's."""
    data: str
    """A folder of pictures, or one picture."""
    step: Literal["assisted", "semi-automatic", "automatic"] = "assisted"
    """assisted: you click; semi-automatic: the model proposes, you drop and add; automatic: the model alone."""
    out: str | None = None
    """The JSON file of COCO's; when absent, objects.json beside the pictures. One that is there is added to."""
    name: str = "object"
    """What objects are called that are given no name."""
    points: int = 16
    """Proposals: points along a side of the grid that the model is asked at."""
    iou: float = 0.88
    """Proposals: the least IoU that the model estimates for a mask."""
    stability: float = 0.95
    """Proposals: the least IoU of a mask at a lower and a higher threshold."""
    least: int = 100
    """Proposals: holes and islands of fewer pixels are filled and dropped."""


def main(options: Options) -> int:
    """Go through the pictures; what is typed is read from standard input, `help` lists the words."""
    from volvelle.cli.annotating import annotate
    from volvelle.systems.segmentation.sam.options import EverythingOptions

    grid = EverythingOptions(points=options.points, iou=options.iou, stability=options.stability, least=options.least)
    out = None if options.out is None else Path(options.out)
    return annotate(options.model, Path(options.data), step=options.step, out=out, name=options.name, grid=grid)
