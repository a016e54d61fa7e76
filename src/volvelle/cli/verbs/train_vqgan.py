"""`volvelle train vqgan`: an image codec on your pictures."""

from __future__ import annotations

from dataclasses import dataclass

from volvelle.train.recipes.vqgan import TrainVQGAN

EXAMPLES = (
    "volvelle train vqgan data=fashion-mnist",
    "volvelle train vqgan data=photos size=128 model.width=64 mirror=0.5 zoom=0.7,1",
)


@dataclass(frozen=True, kw_only=True)
class Options(TrainVQGAN):
    """Train an image codec: pictures become a small grid of codes, and codes become pictures again."""

    run: str | None = None
    """Name of the run folder under runs/; numbered when left out."""


def main(options: Options) -> int:
    """Run the recipe in a new run folder."""
    from volvelle.cli.training import recipe_of, start

    return start("vqgan", recipe_of(TrainVQGAN, options), options.run)
