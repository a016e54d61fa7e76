"""`volvelle train promptable`: Segment Anything on your pictures with masks of objects."""

from __future__ import annotations

from dataclasses import dataclass

from volvelle.train.recipes.promptable import TrainPromptable

EXAMPLES = (
    "volvelle train promptable data=camvid",
    "volvelle train promptable steps=300 size=128 crop=128,128",
)


@dataclass(frozen=True, kw_only=True)
class Options(TrainPromptable):
    """Train Segment Anything by simulated clicks on pictures with masks of objects."""

    run: str | None = None
    """Name of the run folder under runs/; numbered when left out."""


def main(options: Options) -> int:
    """Run the recipe in a new run folder."""
    from volvelle.cli.training import recipe_of, start

    return start("promptable", recipe_of(TrainPromptable, options), options.run)
