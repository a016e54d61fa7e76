"""What a model itself writes, for drafters to learn from: prompts that ask for facts in a sentence, and its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from volvelle.systems.language.decoder import Decoder

ROWS = 48
"""Prompts that are answered side by side."""


def ask(model: Decoder, count: int, asked: int) -> tuple[list[list[int]], list[list[int]]]:
    """At least `count` prompts to learn the answers to, and `asked` others to decode, as conversations of token ids.

    The facts are WebNLG's where it lies in the data folder, else a table of countries.
    """
    from volvelle.claims.prefix_runs import WEBNLG, countries, webnlg

    task = webnlg(asked) if (WEBNLG / "train.jsonl").is_file() else countries(asked)

    def chat(example: Any) -> list[int]:
        facts = example.prompt.removesuffix("=>").strip()
        assert model.tokenizer is not None
        return model.tokenizer.chat_ids([{"role": "user", "content": f"Put these facts into a sentence: {facts}"}])

    return [chat(example) for example in task.train[:count]], [chat(example) for example in task.seen]


def answers(model: Decoder, prompts: Sequence[Sequence[int]], tokens: int) -> Iterator[tuple[list[int], list[int]]]:
    """Each prompt and the model's greedy answer to it, of up to `tokens` tokens."""
    from volvelle.decode import generate_batch

    for start in range(0, len(prompts), ROWS):
        part = [[*prompt] for prompt in prompts[start : start + ROWS]]
        found = generate_batch(model, part, max_tokens=tokens)
        yield from ((prompt, answer.tokens) for prompt, answer in zip(part, found, strict=True))
