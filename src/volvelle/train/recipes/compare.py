"""`volvelle adapt MODEL data=… method=compare`: which method is worth it, on your data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from volvelle.adapt.choices import MethodName
from volvelle.errors import UsageError
from volvelle.train.recipes.adapt import AdaptLanguage, MethodOptions

STEPS = 100
"""The most steps of a training, where the recipe does not say how many."""


@dataclass(frozen=True)
class Comparison:
    """What is compared. Every method begins once with every learning rate, and goes on with the best."""

    methods: tuple[MethodName, ...] = ("full", "lora", "dora", "adapter", "prefix")
    """The methods, in the order of the table."""
    rates: tuple[float, ...] = (1e-4, 1e-3, 3e-3)
    """Peak learning rates; each method is shown with the one that is best on the tuning examples."""
    tuning: int = 64
    """Examples set aside of the training data (never of the held-out data) to choose the learning rate on."""
    look: float = 0.25
    """The share of the steps after which the learning rates are compared: the best one's training goes on to the end,
    the others stop there. 1: all are trained to the end."""

    def __post_init__(self) -> None:
        for name in ("methods", "rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UsageError(f"compare.{name}: needs one or more, each once, got {list(values)}")
        if min(self.rates) <= 0:
            raise UsageError(f"compare.rates: must be above 0, got {min(self.rates)}")
        if not 0 < self.look <= 1:
            raise UsageError(f"compare.look: must be above 0 and at most 1, got {self.look}")
        if self.tuning < 1:
            raise UsageError(f"compare.tuning: must be at least 1, got {self.tuning}")


@dataclass(frozen=True, kw_only=True)
class CompareMethods(MethodOptions):
    """Adapt a model with several methods under one budget, and say what each costs and gives."""

    method: Literal["compare"] = "compare"
    """What makes it a comparison."""
    compare: Comparison = field(default_factory=Comparison)
    """What is compared: compare.methods=lora,full compare.rates=1e-4,1e-3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks > 1:
            raise UsageError("method=compare: trains on one rank", tip="leave ranks out")

    def trial(self, method: MethodName, rate: float, steps: int) -> AdaptLanguage:
        """One training of the comparison. It is short, so that it is saved when it ends or is interrupted only."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(MethodOptions)}
        return AdaptLanguage(
            **values | {"method": method, "learning_rate": rate, "steps": steps, "checkpoint_every": None}
        )
