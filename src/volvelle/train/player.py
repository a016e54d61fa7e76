"""A phase at play: its optimiser, its count of updates, and the update itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from volvelle.data.loader import Batch
from volvelle.errors import VolvelleError
from volvelle.train.isolation import Isolation
from volvelle.train.phase import Loss, Phase
from volvelle.train.precision import Precision
from volvelle.train.ranks import Ranks


class NonFinite(VolvelleError):
    """A loss or a gradient is NaN or infinite. The update was not applied."""


class Player:
    """One phase with everything that its updates change besides the weights."""

    def __init__(self, phase: Phase, isolation: Isolation, precision: Precision, ranks: Ranks):
        self.phase, self.isolation, self.precision, self.ranks = phase, isolation, precision, ranks
        self.optimizer = phase.optimizer(phase.parameters)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.updates = 0
        self._loss: Callable[[Any], Loss] = ranks.wrap(phase, isolation.modules)

    def update(self, batches: Sequence[Batch], describe: Callable[[Sequence[int]], str]) -> dict[str, float]:
        """Sum the gradients of the micro-batches, weighted; clip; step. Gives the metrics, averaged by weight.

        A NaN or infinite loss or gradient raises NonFinite before any weight has changed.
        """
        phase, parameters = self.phase, list(self.phase.parameters.values())
        with self.isolation.turn(phase):
            factor = phase.schedule(self.updates)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            # One micro-batch is its own mean: scaling by its weight and back would only cost a rounding.
            weighted = len(batches) > 1 or self.ranks.world > 1
            last = len(batches) - 1
            losses = [self._backward(batch, weighted, last=i == last) for i, batch in enumerate(batches)]
            self._check(losses, batches, describe)
            # A batch in which nothing is learnt weighs nothing, and its gradient is zero.
            weight = self.ranks.total(sum(loss.weight for loss in losses)) or 1.0
            gradients = [p.grad for p in parameters if p.grad is not None]
            if not gradients:
                raise ValueError(f"Phase {phase.name!r}: its loss reached none of its {len(parameters)} parameters")
            if weighted:
                for gradient in gradients:
                    gradient.div_(weight)
            norm = torch.nn.utils.get_total_norm(gradients)
            if not math.isfinite(float(norm)):
                raise NonFinite(
                    f"phase {phase.name!r}: the gradient's norm is {float(norm)}; {_where(batches, describe)}"
                )
            if phase.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, phase.clip, norm)
            self.optimizer.step()
            self.updates += 1
        if phase.after is not None:
            with torch.no_grad():
                phase.after()
        rate = float(self.optimizer.param_groups[0]["lr"])
        return _average(losses) | {"gradient_norm": float(norm), "learning_rate": rate}

    def _backward(self, batch: Batch, weighted: bool, *, last: bool) -> Loss:
        with self.ranks.accumulating(self._loss, last=last):
            with self.precision.autocast():
                loss = self._loss(batch.value)
            (loss.value * loss.weight if weighted else loss.value).backward()
        # Values only: the graph must be free before the next micro-batch runs.
        metrics = {name: value.detach() if isinstance(value, Tensor) else value for name, value in loss.metrics.items()}
        return Loss(loss.value.detach(), metrics, loss.weight)

    def _check(
        self, losses: Sequence[Loss], batches: Sequence[Batch], describe: Callable[[Sequence[int]], str]
    ) -> None:
        values = torch.stack([loss.value.float() for loss in losses]).tolist()
        for value, batch in zip(values, batches, strict=True):
            if not math.isfinite(value):
                raise NonFinite(f"phase {self.phase.name!r}: the loss is {value}; {_where([batch], describe)}")

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state and the number of updates."""
        return {"optimizer": self.optimizer.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]


def _where(batches: Sequence[Batch], describe: Callable[[Sequence[int]], str]) -> str:
    ids = [i for batch in batches for i in batch.ids]
    return f"samples {describe(ids)}"


def _average(losses: Sequence[Loss]) -> dict[str, float]:
    """Means over micro-batches, weighted as the gradient was."""
    total = sum(loss.weight for loss in losses) or 1.0
    names = ["loss", *losses[0].metrics]
    rows = [[loss.value, *(loss.metrics[name] for name in names[1:])] for loss in losses]
    table = torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)
    weights = torch.tensor([loss.weight for loss in losses], dtype=torch.float64) / total
    return dict(zip(names, (weights @ table).tolist(), strict=True))


def device_of(module_map: Mapping[str, nn.Module]) -> torch.device:
    """The device of the first parameter found."""
    return next((p.device for module in module_map.values() for p in module.parameters()), torch.device("cpu"))


def to_device(value: Any, device: torch.device) -> Any:
    """The same nested dicts, lists and tuples with every tensor on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value
