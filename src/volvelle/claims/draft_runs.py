"""What the claims on drafters share: decoding with and without drafts in turn, and what a step of each width costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from volvelle.claims.claim import Finding, at_most
from volvelle.decode import generate
from volvelle.decode.contract import ALWAYS
from volvelle.systems.language.decoder import Decoder


@dataclass(frozen=True)
class Decoded:
    """Answers with and without drafts: the ratio of their times in each round, tokens a step, answers that differ."""

    ratios: list[float]
    per_step: float
    flips: int
    answers: int
    near_ties: int
    kept: list[float]
    """Of each place behind the newest token the share of its drafts that was kept."""

    @property
    def speedup(self) -> float:
        """The median round's."""
        return statistics.median(self.ratios)


def decode_in_turn(
    model: Decoder, drafter: Any, prompts: Sequence[Sequence[int]], *, max_tokens: int, rounds: int
) -> Decoded:
    """Answer every prompt plainly and with drafts, one after the other, `rounds` times, behind a warm-up."""
    options = {"max_tokens": max_tokens, "eos_ids": ()}
    helped: dict[str, Any] = {"drafter": drafter, "policy": ALWAYS, **options}
    generate(model, prompts[0], **options)
    generate(model, prompts[0], **helped)
    ratios, flips, ties, gained, steps = [], 0, 0, 0, 0
    proposed, accepted = [0] * 64, [0] * 64
    for number in range(rounds):
        plain_seconds = helped_seconds = 0.0
        for prompt in prompts:
            plain, fast = generate(model, prompt, **options), generate(model, prompt, **helped)
            plain_seconds += plain.seconds - plain.prompt_seconds
            helped_seconds += fast.seconds - fast.prompt_seconds
            if number:
                continue
            flips, ties = flips + (plain.tokens != fast.tokens), ties + (fast.near_ties or 0)
            gained, steps = gained + len(fast.tokens) - 1, steps + fast.steps - 1
            for counts, found in ((proposed, fast.proposed), (accepted, fast.accepted)):
                for place, count in enumerate(found):
                    counts[place] += count
        ratios.append(plain_seconds / helped_seconds)
    kept = [a / p for a, p in zip(accepted, proposed, strict=True) if p]
    return Decoded(ratios, gained / steps, flips, len(prompts), ties, kept)


@torch.inference_mode()
def step_costs(model: Decoder, widths: Sequence[int], *, length: int = 96, rounds: int = 7) -> dict[int, float]:
    """The time of a step of n tokens over that of one, over a cache of `length` tokens: medians of rounds in turn."""
    cache = model.new_cache(1, length + max(widths))
    model.hidden(torch.ones(1, length, dtype=torch.long), cache=cache)
    cache.commit()
    seconds: dict[int, list[float]] = {n: [] for n in (1, *widths)}
    for number in range(rounds + 1):
        for n, found in seconds.items():
            begun = time.perf_counter()
            model.logits(model.hidden(torch.ones(1, n, dtype=torch.long), cache=cache)).argmax(-1)
            if number:
                found.append(time.perf_counter() - begun)
    medians = {n: statistics.median(found) for n, found in seconds.items()}
    return {n: medians[n] / medians[1] for n in widths}


def decoding_findings(name: str, found: Decoded, cost: float, k: int) -> list[Finding]:
    """Speed, acceptance and equality, beside what a step of that cost allows."""
    spread = min(found.ratios), max(found.ratios)
    most = found.per_step / cost
    return [
        Finding(f"{name}: tokens gained by a step", found.per_step),
        *(Finding(f"{name}: drafts kept at place {d}", share) for d, share in enumerate(found.kept[:4], 1)),
        Finding(f"time of a step of {1 + k} tokens over one of 1", cost, "x"),
        Finding(f"{name}: speed-up over plain decoding", found.speedup, "x", spread=spread),
        Finding(f"{name}: the most that acceptance and step cost allow, if drafts cost nothing", most, "x"),
    ]


def same_answers(name: str, found: Decoded, dtype: str) -> Finding:
    """Greedy answers that differ from those of plain decoding."""
    return at_most(f"{name}: greedy answers that differ from plain ones in {dtype}, of {found.answers}", found.flips, 0)


def best_k(lengths: Mapping[int, float], costs: Mapping[int, float]) -> int:
    """The draft size k with the most tokens a second, from the tokens drafts of k keep and the costs of 1 + k tokens.

    >>> best_k({3: 0.9, 7: 1.0}, {4: 1.1, 8: 1.5})
    3
    """
    return max(lengths, key=lambda k: (1 + lengths[k]) / costs[1 + k])
