"""`volvelle train detect`: a detector on your pictures with boxes."""

from __future__ import annotations

from dataclasses import dataclass

from volvelle.train.recipes.detect import TrainDetect

EXAMPLES = (
    "volvelle train detect data=bccd",
    "volvelle train detect steps=300 size=128 model=thundernet-snet49 upside_down=0",
)


@dataclass(frozen=True, kw_only=True)
class Options(TrainDetect):
    """Train a detector on pictures with boxes, watch it on a part of them, and measure it on others."""

    run: str | None = None
    """Name of the run folder under runs/; numbered when left out."""


def main(options: Options) -> int:
    """Run the recipe in a new run folder."""
    from volvelle.cli.training import recipe_of, start

    return start("detect", recipe_of(TrainDetect, options), options.run)
