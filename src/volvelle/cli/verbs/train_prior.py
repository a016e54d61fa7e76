"""`volvelle train prior`: a language model over the codes of an image codec, which draws pictures."""

from __future__ import annotations

from dataclasses import dataclass

from volvelle.train.recipes.prior import TrainPrior

EXAMPLES = (
    "volvelle train prior data=pictures codec=runs/vqgan-1 model.width=320",
    "volvelle train prior data=fashion-mnist epochs=3",
)


@dataclass(frozen=True, kw_only=True)
class Options(TrainPrior):
    """Train a language model over the codes of an image codec, so that it draws pictures."""

    run: str | None = None
    """Name of the run folder under runs/; numbered when left out."""


def main(options: Options) -> int:
    """Run the recipe in a new run folder."""
    from volvelle.cli.training import recipe_of, start

    return start("prior", recipe_of(TrainPrior, options), options.run)
