"""`volvelle train segment`: a segmenter on your images with masks."""

from __future__ import annotations

from dataclasses import dataclass

from volvelle.train.recipes.segment import TrainSegment

EXAMPLES = (
    "volvelle train segment data=camvid steps=2000 looks.scales=0.75,1,1.25,1.5 looks.mirror=true",
    "volvelle train segment steps=300 crop=128,128 model.head=unet",
)


@dataclass(frozen=True, kw_only=True)
class Options(TrainSegment):
    """Train a segmenter on images with masks, choose its best moment on a part of them, and measure it on others."""

    run: str | None = None
    """Name of the run folder under runs/; numbered when left out."""


def main(options: Options) -> int:
    """Run the recipe in a new run folder."""
    from volvelle.cli.training import recipe_of, start

    return start("segment", recipe_of(TrainSegment, options), options.run)
