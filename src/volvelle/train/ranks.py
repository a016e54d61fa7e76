"""The processes that train together. This is the case of one; the loop asks it everything that many would change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from volvelle.train.phase import Loss, Phase


class Ranks:
    """One process: nothing to wrap, nothing to agree on.

    The loop calls a phase's loss only through `wrap`'s result, runs every micro-batch inside `accumulating`, divides
    gradients by `total` weights, and stops only when `any` says so; a distributed version overrides these four.
    """

    rank = 0
    world = 1

    def wrap(self, phase: Phase, modules: Mapping[str, nn.Module]) -> Callable[[Any], Loss]:
        """The callable that computes the phase's loss, with whatever averages its gradients over ranks built in."""
        return phase.loss

    def accumulating(self, loss: Callable[[Any], Loss], *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around one micro-batch; gradients travel between ranks only in the `last` of an update."""
        return contextlib.nullcontext()

    def total(self, weight: float) -> float:
        """Sum of the ranks' weights, divided by the number of ranks (their gradients arrive averaged)."""
        return weight

    def any(self, flag: bool) -> bool:
        """Whether any rank raised the flag: all stop together or none does."""
        return flag
