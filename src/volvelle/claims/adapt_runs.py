"""The trainings behind the claims lora, dora, adapter and svd-extraction, on the bench of the claim prefix."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from volvelle.adapt import apply, merge
from volvelle.adapt.methods import Full, Method
from volvelle.claims.claim import Budget, Finding, at_least, at_most
from volvelle.claims.prefix_runs import Bench, Result, open_bench

N = {"quick": 100, "full": 1000}
STEPS = {"quick": 8, "full": 60}


@dataclass
class MethodBench(Bench):
    """The bench with methods of one's own, by name; "full" is always among them."""

    methods: Mapping[str, Method] = field(default_factory=dict)

    def _method(self, kind: str) -> Method:
        return Full() if kind == "full" else self.methods[kind]

    @property
    def n(self) -> int:
        """Examples that every training sees."""
        return self.counts[0]

    @property
    def base_loss(self) -> float:
        """Held-out loss a token before any training."""
        return self.loss(self.model)

    def loss(self, model: Any) -> float:
        """Held-out loss a token, on the topics that were trained on."""
        return self._loss(model, self.task.seen)

    def result(self, kind: str) -> Result:
        """The losses of a method at its best learning rate."""
        return self.best(kind, self.n)

    def trained(self, kind: str) -> Any:
        """The model behind `result`, trained again."""
        return self._trained(kind, self.task.train[: self.n], self.result(kind).rate)

    def share(self, kind: str) -> float:
        """What a method trains, over the model's own parameters."""
        model = copy.deepcopy(self.model)
        total = sum(p.numel() for p in model.parameters())
        return apply(model, self.methods[kind]).trainable_count / total

    def gain(self, kind: str) -> float:
        """The fall of the held-out loss over that of full fine-tuning."""
        return (self.base_loss - self.result(kind).seen) / (self.base_loss - self.result("full").seen)

    @property
    def about(self) -> dict[str, object]:
        """What the figures depend on."""
        return {**{k: v for k, v in self.setting.items() if k != "prefix"}, "examples": self.n,
                "methods": {name: repr(method) for name, method in self.methods.items()}}  # fmt: skip


def method_bench(budget: Budget, methods: Mapping[str, Method]) -> MethodBench:
    """Load the model and the task; raises VolvelleError when one of them cannot be had."""
    bench = open_bench(budget)
    values = {each.name: getattr(bench, each.name) for each in dataclasses.fields(Bench)}
    values |= {"counts": (N[budget],), "steps": STEPS[budget]}
    return MethodBench(**values, methods=methods)


def against_full(bench: MethodBench, kind: str, most: float, least: float | None) -> list[Finding]:
    """The gain against full fine-tuning, the share trained, and losses; None: the paper says nothing of this kind's."""
    full, ours = bench.result("full"), bench.result(kind)
    what = f"{kind}: fall of the loss over that of full fine-tuning"
    gain = Finding(what, bench.gain(kind), "x") if least is None else at_least(what, bench.gain(kind), least, "x")
    return [
        gain,
        at_most(f"{kind}: trained, of all parameters", 100 * bench.share(kind), 100 * most, "%"),
        Finding("held-out loss a token before training", bench.base_loss, "nats"),
        Finding(f"full fine-tuning: held-out loss (rate {full.rate:g})", full.seen, "nats"),
        Finding(f"{kind}: held-out loss (rate {ours.rate:g})", ours.seen, "nats"),
    ]


@torch.no_grad()
def no_latency(bench: MethodBench, kind: str) -> list[Finding]:
    """A merged model has the base's modules and parameters, and computes what the adapted one did."""
    model: Any = copy.deepcopy(bench.model)
    before = _graph(model)
    adapted = apply(model, bench.methods[kind], generator=torch.Generator().manual_seed(0))
    for number, parameter in enumerate(adapted.trainable.values()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.add_(0.01 * noise)
    ids = torch.arange(20)[None] + 100
    beside = model.eval()(ids).logits
    merged = merge(model, keep=False)(ids).logits
    return [
        at_most(
            f"{kind}: modules and parameters of a merged model that the base has not", len(_graph(model) ^ before), 0
        ),
        at_most(
            f"{kind}: fp32 logits, merged against beside, of the largest",
            float((merged - beside).abs().max() / beside.abs().max()),
            1e-4,
        ),
    ]


def _graph(model: nn.Module) -> set[tuple[str, object]]:
    modules = {(name, type(module)) for name, module in model.named_modules()}
    return modules | {(name, tuple(p.shape)) for name, p in model.named_parameters()}


@torch.no_grad()
def begins_as_the_base(bench: MethodBench, kind: str, bound: float = 0.0) -> Finding:
    """Largest difference of a logit from the base's at step 0."""
    model: Any = copy.deepcopy(bench.model).eval()
    ids = torch.arange(20)[None] + 100
    before = model(ids).logits
    apply(model, bench.methods[kind], generator=torch.Generator().manual_seed(0))
    return at_most(
        f"{kind}: largest change of a logit at step 0", float((model(ids).logits - before).abs().max()), bound
    )
