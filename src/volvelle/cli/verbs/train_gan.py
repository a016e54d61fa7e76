"""`volvelle train gan`: a generator of pictures against a critic."""

from __future__ import annotations

from dataclasses import dataclass

from volvelle.train.recipes.gan import TrainGAN

EXAMPLES = (
    "volvelle train gan data=fashion-mnist steps=2000",
    "volvelle train gan data=photos size=64 loss=wasserstein critic.kind=resnet generator.kind=resnet",
)


@dataclass(frozen=True, kw_only=True)
class Options(TrainGAN):
    """Train a generator of pictures against a critic, by the rules of one of five games."""

    run: str | None = None
    """Name of the run folder under runs/; numbered when left out."""


def main(options: Options) -> int:
    """Run the recipe in a new run folder."""
    from volvelle.cli.training import recipe_of, start

    return start("gan", recipe_of(TrainGAN, options), options.run)
