"""`volvelle train classify`: an image classifier on your folders of pictures."""

from __future__ import annotations

from dataclasses import dataclass

from volvelle.train.recipes.classify import TrainClassify

EXAMPLES = (
    "volvelle train classify data=pictures epochs=5",
    "volvelle train classify data=fashion-mnist backbone=snet49 weights=none steps=500 batch=64",
)


@dataclass(frozen=True, kw_only=True)
class Options(TrainClassify):
    """Train an image classifier on a folder with a folder for each class, from known weights or from scratch."""

    run: str | None = None
    """Name of the run folder under runs/; numbered when left out."""


def main(options: Options) -> int:
    """Run the recipe in a new run folder."""
    from volvelle.cli.training import recipe_of, start

    return start("classify", recipe_of(TrainClassify, options), options.run)
