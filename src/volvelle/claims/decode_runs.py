"""The runs behind the claims on drafts: the same prompts plainly and with drafts, turn about, and the cost of a step.

Shapes: n tokens a step, k = n - 1 of them drafted.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch

from volvelle.claims.claim import Finding, at_most
from volvelle.decode.contract import ALWAYS, Drafted, Drafter, Pacing, Policy
from volvelle.decode.cost import CostCurve, DraftCost, measured_improvement, walltime_improvement
from volvelle.decode.generation import generate
from volvelle.decode.request import Generation
from volvelle.processor import bf16_flags
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.load import load_language_model

WIDTHS = (2, 3, 4, 5, 6, 8, 12, 16)
WARM_UP = 24
"""Tokens that are written before any is timed: kernels are prepared for the widths of steps here."""


class Fixed(Policy, Pacing):
    """The policy that always asks for `k` tokens, and keeps the times of steps and drafts."""

    def __init__(self, k: int):
        self.k, self.steps, self.drafts = k, CostCurve(), DraftCost()

    def begin(self) -> Fixed:
        """One run is like another."""
        return self

    def choose(self, limit: int, length: int) -> int:
        """k, where so many fit."""
        return min(self.k, limit)

    def observe(self, length: int, draft: Drafted | None, *, step_seconds: float, draft_seconds: float = 0.0) -> None:
        """Keep the times, under one length of the cache."""
        self.steps.observe(1 if draft is None else 1 + draft.k, 1, step_seconds)
        if draft is not None:
            self.drafts.observe(draft.k, 1, draft_seconds)


@dataclass
class Compared:
    """Plain and drafted answers to the same prompts; of each round the ratio of the times that they took."""

    ratios: list[float]
    plain: list[Generation]
    drafted: list[Generation]

    @property
    def speed_up(self) -> float:
        """The median round's."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """Least and largest of the rounds."""
        return min(self.ratios), max(self.ratios)

    @property
    def plain_seconds(self) -> float:
        """Seconds a token of plain decoding."""
        return _writing(self.plain) / sum(len(answer.tokens) - 1 for answer in self.plain)

    @property
    def differing(self) -> int:
        """Answers that are not, token for token, those of plain decoding."""
        return sum(ours.tokens != theirs.tokens for ours, theirs in zip(self.drafted, self.plain, strict=True))

    @property
    def near_ties(self) -> int:
        """Tokens that were ahead of the next best by less than what the width of a step changes."""
        return sum(answer.near_ties or 0 for answer in self.drafted)

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that were kept, of those whose predecessors were."""
        kept = sum(sum(answer.accepted) for answer in self.drafted)
        tried = sum(
            min(count, before)
            for answer in self.drafted
            for count, before in zip(answer.proposed, [*answer.proposed[:1], *answer.accepted], strict=False)
        )
        return kept / tried if tried else 0.0

    @property
    def kept(self) -> list[float]:
        """Of each place behind the newest token the share of its drafts that was kept."""
        proposed = map(sum, zip_longest(*(answer.proposed for answer in self.drafted), fillvalue=0))
        accepted = map(sum, zip_longest(*(answer.accepted for answer in self.drafted), fillvalue=0))
        return [a / p for a, p in zip_longest(accepted, proposed, fillvalue=0) if p]

    @property
    def kept_a_draft(self) -> float:
        """Draft tokens kept a step that had a draft."""
        steps = sum(answer.proposed[0] for answer in self.drafted if answer.proposed)
        return sum(sum(answer.accepted) for answer in self.drafted) / steps if steps else 0.0

    @property
    def per_step(self) -> float:
        """Tokens gained by a step behind the prompt's, with a draft or without."""
        return sum(len(answer.tokens) - 1 for answer in self.drafted) / sum(answer.steps - 1 for answer in self.drafted)


def compare(
    model: Decoder,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    policy: Policy = ALWAYS,
    max_tokens: int,
    rounds: int,
    eos_ids: Sequence[int] | None = (),
) -> Compared:
    """Answer every prompt plainly and with drafts, turn about, `rounds` times, behind a short warm-up.

    Answers end at `max_tokens` alone, unless `eos_ids` says otherwise (None: the tokenizer's); those of the last round
    are kept.
    """

    def answer(prompt: Sequence[int], drafter: Drafter | None, tokens: int = max_tokens) -> Generation:
        return generate(model, prompt, max_tokens=tokens, eos_ids=eos_ids, drafter=drafter, policy=policy)

    for helper in (None, drafter):
        answer(prompts[0], helper, min(max_tokens, WARM_UP))
    turns = [[(answer(prompt, None), answer(prompt, drafter)) for prompt in prompts] for _ in range(rounds)]
    ratios = [_writing(plain for plain, _ in turn) / _writing(drafted for _, drafted in turn) for turn in turns]
    return Compared(ratios, [plain for plain, _ in turns[-1]], [drafted for _, drafted in turns[-1]])


def _writing(answers: Iterable[Generation]) -> float:
    """Seconds behind the prompts."""
    return sum(answer.seconds - answer.prompt_seconds for answer in answers)


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


def step_cost(n: int, ratio: float) -> Finding:
    """A point of the cost curve as a figure."""
    return Finding(f"time of a step of {n} tokens over one of 1", ratio, "x")


def decoding_findings(name: str, found: Compared, cost: float, k: int) -> list[Finding]:
    """Acceptance and speed, beside what a step of k drafted tokens allows, which costs `cost` plain ones."""
    most = found.per_step / cost
    return [
        Finding(f"{name}: tokens gained by a step", found.per_step),
        *(Finding(f"{name}: drafts kept at place {d}", share) for d, share in enumerate(found.kept[:4], 1)),
        step_cost(1 + k, cost),
        Finding(f"{name}: speed-up over plain decoding", found.speed_up, "x", spread=found.spread),
        Finding(f"{name}: the most that acceptance and step cost allow, if drafts cost nothing", most, "x"),
    ]


def same_answers(name: str, found: Compared, dtype: str) -> Finding:
    """Greedy answers that differ from those of plain decoding: none may."""
    what = f"{name}: greedy answers that differ from plain ones in {dtype}, of {len(found.plain)}"
    return at_most(what, found.differing, 0)


@dataclass
class DraftBench:
    """A model and prompts to continue greedily, by `tokens` each, `rounds` times."""

    model: Decoder
    prompts: Mapping[str, Sequence[int]]
    tokens: int
    rounds: int
    setting: dict[str, object] = field(default_factory=dict)

    def compare(self, drafter: Drafter, policy: Policy, names: Sequence[str] | None = None) -> Compared:
        """Decode the named prompts (default: all) plainly and with drafts, turn about."""
        asked = self.named(self.prompts if names is None else names)
        return compare(self.model, drafter, asked, policy=policy, max_tokens=self.tokens, rounds=self.rounds)

    def named(self, names: Iterable[str]) -> list[Sequence[int]]:
        """These prompts."""
        return [self.prompts[name] for name in names]

    @functools.cached_property
    def curve(self) -> dict[int, float]:
        """The time of a step of n tokens over that of one, behind the longest prompt; medians of interleaved rounds."""
        length = max(map(len, self.prompts.values()))
        return {1: 1.0, **step_costs(self.model, WIDTHS, length=length + self.tokens // 2, rounds=2 * self.rounds + 3)}

    def identical(self, who: str, drafter: Drafter, tokens: int, names: Sequence[str]) -> Finding:
        """How many fp32 answers with drafts are not those of plain decoding."""
        model = in_fp32(self.model)
        found = compare(model, drafter, self.named(names), policy=Fixed(6), max_tokens=tokens, rounds=1)
        return same_answers(who, found, "fp32")

    def judged(self, who: str, found: Compared, fixed: Fixed) -> list[Finding]:
        """Acceptance, what a draft costs (in plain steps), and the bounds; each by the formula and by the curve."""
        a, k = found.acceptance, fixed.k
        draft = (fixed.drafts.seconds(k, 1) or 0.0) / found.plain_seconds
        bound = measured_improvement(found.kept_a_draft, k, self.widths(k), draft)
        return [
            Finding(f"{who}: drafted tokens kept, of those behind kept ones", a, "of 1"),
            Finding(f"{who}: draft tokens kept a step of k = {k}", found.kept_a_draft, "tokens"),
            Finding(f"{who}: cost of a draft of {k}", draft, "plain steps"),
            Finding(f"{who}: (1 - a^(k+1)) / ((1 - a)(kc + 1))", walltime_improvement(a, k, draft / k), "x"),
            Finding(f"{who}: the bound with the measured cost curve", bound, "x"),
            Finding(f"{who}: speed-up, k = {k} always", found.speed_up, "x", spread=found.spread),
        ]

    def widths(self, k: int) -> dict[int, float]:
        """The curve with a point for steps of k + 1 tokens."""
        curve = CostCurve()
        for n, ratio in self.curve.items():
            curve.observe(n, 1, ratio)
        return {**self.curve, k + 1: curve.seconds(k + 1, 1) or 1.0}

    def curve_findings(self) -> list[Finding]:
        """The cost curve as figures."""
        return [step_cost(n, self.curve[n]) for n in (2, 4, 8, 16)]


def smollm2(dtype: torch.dtype | None = None) -> Decoder:
    """SmolLM2; None: in bf16 where the processor multiplies it, else in fp32.

    Raises VolvelleError when it cannot be had.
    """
    if dtype is None:
        dtype = torch.bfloat16 if bf16_flags() else torch.float32
    model = load_language_model("smollm2", dtype=dtype)
    assert isinstance(model, Decoder)  # smollm2 is one, with a tokenizer
    assert model.tokenizer is not None
    return model


def in_fp32(model: Decoder) -> Decoder:
    """SmolLM2 in fp32: `model` itself where it is."""
    return model if model.dtype == torch.float32 else smollm2(torch.float32)


def open_bench(prompts: Mapping[str, str], tokens: int, rounds: int) -> DraftBench:
    """SmolLM2 and chat prompts; raises VolvelleError when the model cannot be had."""
    model = smollm2()
    assert model.tokenizer is not None
    ids = {name: model.tokenizer.chat_ids([{"role": "user", "content": text}]) for name, text in prompts.items()}
    setting = {"model": "smollm2", "dtype": str(model.dtype), "tokens": tokens, "prompts": len(prompts),
               "rounds": rounds, "threads": torch.get_num_threads(), "batch": 1}  # fmt: skip
    return DraftBench(model, ids, tokens, rounds, setting)
