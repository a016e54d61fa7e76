"""A moving average of the weights (EMA): often better on held-out data than the weights of any single step.

After the n-th update (counted from 0) the average a of a weight w is

    a ← w                        for n = 0
    a ← d a + (1 - d) w          for n > 0, with d = min(decay, (1 + n) / (10 + n))

The smaller d of the first updates is a warm-up: a decay of 0.999 alone would hold on to the random start for thousands
of steps. Polyak & Juditsky 1992 average all steps; the exponential form and this warm-up are those of TensorFlow's
ExponentialMovingAverage. With `warmup=False` it is torch.optim.swa_utils.AveragedModel with get_ema_multi_avg_fn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class WeightAverage:
    """The moving average of `weights`, by name, in fp32 (fp64 for fp64 weights) beside them.

    `weights` are what the optimiser steps: for a model stored in 16 bits its fp32 master weights. Buffers are not
    averaged; batch norm's statistics are averages already.

    >>> w = torch.zeros(1)
    >>> average = WeightAverage({"w": w}, decay=0.9, warmup=False)
    >>> for value in (1.0, 2.0):
    ...     _ = w.fill_(value)
    ...     average.update()
    >>> round(float(average.mean["w"]), 4)
    1.1
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float, *, warmup: bool = True):
        if not 0 < decay < 1:
            raise ValueError(f"WeightAverage: decay must lie between 0 and 1, got {decay}")
        self.weights, self.decay, self.warmup = dict(weights), decay, warmup
        self.mean = {name: _wide(w).clone() for name, w in self.weights.items()}
        self.count = 0
        """Updates that the average has seen."""

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        n, d = self.count, self.decay
        d = 0.0 if n == 0 else min(d, (1 + n) / (10 + n)) if self.warmup else d
        for name, w in self.weights.items():
            self.mean[name].lerp_(_wide(w), 1 - d)
        self.count += 1

    @torch.no_grad()
    def copy_to(self, weights: Mapping[str, Tensor]) -> None:
        """Write the average into these tensors of the same names, rounded to their dtypes; before any update, nothing.

        An average of no update is the weights themselves.
        """
        if self.count:
            for name, w in weights.items():
                w.copy_(self.mean[name])

    @contextlib.contextmanager
    def inside(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """While the block runs `weights` hold the average; afterwards they have their own bits again."""
        kept = {name: w.detach().clone() for name, w in weights.items()} if self.count else {}
        self.copy_to(weights)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, w in kept.items():
                    weights[name].copy_(w)

    def state_dict(self) -> dict[str, Any]:
        """The average and its count."""
        return {"count": self.count, "mean": self.mean}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`."""
        self.count = state["count"]
        for name, mean in self.mean.items():
            mean.copy_(state["mean"][name])


def _wide(w: Tensor) -> Tensor:
    return w.detach().to(torch.promote_types(w.dtype, torch.float32))
