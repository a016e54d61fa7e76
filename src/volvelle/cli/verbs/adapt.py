"""`volvelle adapt`: fit a model that exists to your text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tyro.conf import Positional

from volvelle.errors import UsageError
from volvelle.train.recipes.adapt import AdaptLanguage
from volvelle.train.recipes.compare import CompareMethods, Comparison

EXAMPLES = (
    "volvelle adapt smollm2 data=examples.jsonl steps=100",
    "volvelle adapt smollm2 data=train.jsonl 'prompt={{ triples }}' 'completion={{ references }}' lora.rank=16",
    "volvelle adapt smollm2 data=train.jsonl method=adapter adapter.form=pfeiffer",
    "volvelle adapt smollm2 data=examples.jsonl method=compare steps=100",
)


@dataclass(frozen=True, kw_only=True)
class Options(AdaptLanguage):
    """Adapt a language model to examples or plain text."""

    model: Positional[str]
    """A known model, a Hugging Face repo id, a folder, or a run."""
    method: Literal["lora", "dora", "adapter", "prefix", "prompt", "full", "compare"] = "lora"  # type: ignore[assignment]
    """What is trained: additions to some layers (lora, dora, adapter), to the text (prefix, prompt), or full: all.
    compare tries several, and says what each costs and gives."""
    compare: Comparison = field(default_factory=Comparison)
    """What method=compare compares: compare.methods=lora,full compare.rates=1e-4,1e-3."""
    run: str | None = None
    """Name of the run folder under runs/; numbered when left out."""

    def __post_init__(self) -> None:
        if self.method == "compare":
            first = self.compare.rates[0]
            if self.learning_rate not in (None, first):
                raise UsageError("learning_rate: method=compare tries several", tip="compare.rates=1e-4,1e-3,1e-2")
            object.__setattr__(self, "learning_rate", first)
        super().__post_init__()


def main(options: Options) -> int:
    """Run the recipe in a new run folder."""
    from volvelle.cli.training import recipe_of, start

    if options.method == "compare":
        return start("compare", recipe_of(CompareMethods, options), options.run)
    return start("adapt", recipe_of(AdaptLanguage, options), options.run)
