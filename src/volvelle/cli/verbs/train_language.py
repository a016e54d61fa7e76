"""`volvelle train language`: a language model from scratch."""

from __future__ import annotations

from dataclasses import dataclass

from volvelle.train.recipes.language import TrainLanguage

EXAMPLES = (
    "volvelle train language data=book.txt steps=500",
    "volvelle train language data=book.txt model.width=128 model.depth=4 vocabulary=1024",
)


@dataclass(frozen=True, kw_only=True)
class Options(TrainLanguage):
    """Train a small decoder on text, with the tokenizer of a given model or one trained on the data."""

    run: str | None = None
    """Name of the run folder under runs/; numbered when left out."""


def main(options: Options) -> int:
    """Run the recipe in a new run folder."""
    from volvelle.cli.training import recipe_of, start

    return start("language", recipe_of(TrainLanguage, options), options.run)
