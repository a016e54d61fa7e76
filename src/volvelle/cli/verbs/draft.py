"""`volvelle draft`: train what drafts for a model, so that it decodes several tokens in a step."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from volvelle.train.recipes.draft import TrainDraft

EXAMPLES = (
    "volvelle draft smollm2 data=prompts distill=true precision=bf16 vocabulary=8192",
    "volvelle draft smollm2 data=prompts distill=true precision=bf16 kind=ngram",
    "volvelle draft smollm2 data=train.jsonl kind=mtp vocabulary=8192 precision=bf16",
    "volvelle draft smollm2 data=train.jsonl medusa.heads=3 medusa.backbone=lora",
)


@dataclass(frozen=True, kw_only=True)
class Options(TrainDraft):
    """Train what drafts for a language model, so that it decodes several tokens in a step."""

    model: Positional[str]
    """The model to draft for: a known model, a Hugging Face repo id, a folder, or a run."""
    run: str | None = None
    """Name of the run folder under runs/; numbered when left out."""


def main(options: Options) -> int:
    """Run the recipe in a new run folder."""
    from volvelle.cli.training import recipe_of, start

    return start("draft", recipe_of(TrainDraft, options), options.run)
