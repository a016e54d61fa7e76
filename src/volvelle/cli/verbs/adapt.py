"""`volvelle adapt`: fit a model that exists to your text."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from volvelle.train.recipes.adapt import AdaptLanguage

EXAMPLES = (
    "volvelle adapt smollm2 data=examples.jsonl steps=100",
    "volvelle adapt smollm2 data=train.jsonl 'prompt={{ triples }}' 'completion={{ references }}' lora.rank=16",
    "volvelle adapt smollm2 data=train.jsonl method=adapter adapter.form=pfeiffer",
)


@dataclass(frozen=True, kw_only=True)
class Options(AdaptLanguage):
    """Adapt a language model to examples or plain text."""

    model: Positional[str]
    """A known model, a Hugging Face repo id, a folder, or a run."""
    run: str | None = None
    """Name of the run folder under runs/; numbered when left out."""


def main(options: Options) -> int:
    """Run the recipe in a new run folder."""
    from volvelle.cli.training import recipe_of, start

    return start("adapt", recipe_of(AdaptLanguage, options), options.run)
