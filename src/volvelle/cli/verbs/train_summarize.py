"""`volvelle train summarize`: an encoder-decoder from scratch that learns to summarise."""

from __future__ import annotations

from dataclasses import dataclass

from volvelle.train.recipes.summarize import TrainSummarize

EXAMPLES = (
    "volvelle train summarize steps=1000",
    "volvelle train summarize data=pairs.jsonl model.width=128 model.depth=2 beams.width=1",
)


@dataclass(frozen=True, kw_only=True)
class Options(TrainSummarize):
    """Train a small BART on texts and their summaries, with a tokenizer trained on the data."""

    run: str | None = None
    """Name of the run folder under runs/; numbered when left out."""


def main(options: Options) -> int:
    """Run the recipe in a new run folder."""
    from volvelle.cli.training import recipe_of, start

    return start("summarize", recipe_of(TrainSummarize, options), options.run)
