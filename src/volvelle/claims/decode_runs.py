"""The runs behind the claims on drafts: the same prompts plainly and with drafts, turn about, and the cost of a step.

Shapes: n tokens a step, k = n - 1 of them drafted.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from volvelle.claims.amp import sixteen_bits
from volvelle.claims.claim import Finding, at_most
from volvelle.claims.draft_runs import step_costs
from volvelle.decode.contract import Drafted, Drafter, Pacing, Policy
from volvelle.decode.cost import CostCurve, DraftCost, measured_improvement, walltime_improvement
from volvelle.decode.generation import generate
from volvelle.decode.policy import Adaptive
from volvelle.decode.request import Generation
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.load import load_language_model

WIDTHS = (2, 3, 4, 5, 6, 8, 12, 16)


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
    """Plain and drafted answers to the same prompts; of each prompt the median ratio of their rates."""

    ratios: list[float]
    plain: list[Generation]
    drafted: list[Generation]

    @property
    def speed_up(self) -> float:
        """Mean over the prompts."""
        return statistics.mean(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """Least and largest of the prompts."""
        return min(self.ratios), max(self.ratios)

    @property
    def differing(self) -> int:
        """Answers that are not, token for token, those of plain decoding."""
        return sum(ours.tokens != theirs.tokens for ours, theirs in zip(self.drafted, self.plain, strict=True))

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
    def kept(self) -> float:
        """Draft tokens kept a step that had a draft."""
        steps = sum(answer.proposed[0] for answer in self.drafted if answer.proposed)
        return sum(sum(answer.accepted) for answer in self.drafted) / steps if steps else 0.0


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
        found = Compared([], [], [])
        for name in self.prompts if names is None else names:
            rates = []
            for _ in range(self.rounds):
                plain, drafted = self.answer(name), self.answer(name, drafter, policy)
                rates.append(drafted.tokens_per_second / plain.tokens_per_second)
            found.ratios.append(statistics.median(rates))
            found.plain.append(plain)
            found.drafted.append(drafted)
        return found

    def answer(self, name: str, drafter: Drafter | None = None, policy: Policy | None = None) -> Generation:
        """One answer, without an end but its length."""
        return generate(
            self.model, self.prompts[name], max_tokens=self.tokens, eos_ids=(), drafter=drafter,
            policy=Adaptive() if policy is None else policy,
        )  # fmt: skip

    @functools.cached_property
    def curve(self) -> dict[int, float]:
        """The time of a step of n tokens over that of one, behind the longest prompt; medians of interleaved rounds."""
        length = max(map(len, self.prompts.values()))
        return {1: 1.0, **step_costs(self.model, WIDTHS, length=length + self.tokens // 2, rounds=2 * self.rounds + 3)}

    def identical(self, drafter: Drafter, tokens: int, names: Sequence[str]) -> Finding:
        """How many fp32 answers with drafts are not those of plain decoding."""
        model = self.model if self.model.dtype == torch.float32 else load_language_model("smollm2", dtype=torch.float32)
        assert isinstance(model, Decoder)
        bench = DraftBench(model, self.prompts, tokens, 1)
        different = bench.compare(drafter, Fixed(6), names).differing
        return at_most(f"fp32 answers that differ from plain ones, of {len(names)}", different, 0)

    def judged(self, who: str, found: Compared, k: int, draft: float) -> list[Finding]:
        """Acceptance, what a draft costs (in plain steps), and the bounds; each by the formula and by the curve."""
        a = found.acceptance
        bound = measured_improvement(found.kept, k, self.widths(k), draft)
        return [
            Finding(f"{who}: drafted tokens kept, of those behind kept ones", a, "of 1"),
            Finding(f"{who}: draft tokens kept a step of k = {k}", found.kept, "tokens"),
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
        return [Finding(f"time of a step of {n} tokens over one of 1", self.curve[n], "x") for n in (2, 4, 8, 16)]


def open_bench(prompts: Mapping[str, str], tokens: int, rounds: int) -> DraftBench:
    """SmolLM2 in bf16 where the processor multiplies it, else fp32, and chat prompts.

    Raises VolvelleError when the model cannot be had.
    """
    dtype = torch.bfloat16 if sixteen_bits() & {"amx_bf16", "avx512_bf16"} else torch.float32
    model = load_language_model("smollm2", dtype=dtype)
    assert isinstance(model, Decoder)  # smollm2 is one, with a tokenizer
    assert model.tokenizer is not None
    ids = {name: model.tokenizer.chat_ids([{"role": "user", "content": text}]) for name, text in prompts.items()}
    setting = {"model": "smollm2", "dtype": str(dtype), "tokens": tokens, "prompts": len(prompts), "rounds": rounds,
               "threads": torch.get_num_threads(), "batch": 1}  # fmt: skip
    return DraftBench(model, ids, tokens, rounds, setting)
