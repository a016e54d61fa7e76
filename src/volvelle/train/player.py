"""A phase at play: its optimiser, its loss scale, its averaged weights, its counts, and the update itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from volvelle.data.loader import Batch
from volvelle.parts.precision.master_weights import MasterWeights
from volvelle.systems.buffers import Buffer, buffers_of
from volvelle.train.average import WeightAverage
from volvelle.train.isolation import Isolation
from volvelle.train.nonfinite import IN_A_ROW, NonFinite, Skipped, where_it_began
from volvelle.train.phase import Loss, Phase
from volvelle.train.precision import Precision
from volvelle.train.random_state import random_state
from volvelle.train.ranks import Ranks

Describe = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class _Attempt:
    """The micro-batches of one update, and what came of them before any weight was touched."""

    batches: Sequence[Batch]
    losses: Sequence[Loss]
    moments: Sequence[dict[str, Any]]
    """The random state before each micro-batch."""
    gradients: Sequence[Tensor]
    norm: Tensor
    lost: Sequence[tuple[int, float]]
    """Number and loss of the micro-batches whose loss is NaN or infinite."""

    @property
    def sound(self) -> bool:
        """Whether all losses and the gradient's norm are finite."""
        return not self.lost and math.isfinite(float(self.norm))


class Player:
    """One phase with everything that its updates change besides the weights.

    The optimiser works on fp32 master weights where the model's are stored in 16 bits. `on_nan="skip"` leaves out
    updates with a NaN or infinite loss or gradient, tells `say`, and gives up after 20 in a row; `average` is the decay
    of an average of the weights.
    """

    def __init__(
        self,
        phase: Phase,
        isolation: Isolation,
        precision: Precision,
        ranks: Ranks,
        *,
        on_nan: Literal["stop", "skip"] = "stop",
        average: float | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.phase, self.isolation, self.precision, self.ranks = phase, isolation, precision, ranks
        self.on_nan, self._say = on_nan, say
        self.held = MasterWeights(phase.parameters.values())
        self.masters = dict(zip(phase.parameters, self.held.masters, strict=True))
        self.optimizer = phase.optimizer(self.masters)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.scaler = precision.scaler()
        self.average = None if average is None else WeightAverage(self.masters, average)
        self.updates = 0
        self.skipped = Skipped()
        self._unit = 1.0
        self._named = False
        self._loss: Callable[[Any], Loss] = ranks.wrap(phase, isolation.modules)

    def update(self, batches: Sequence[Batch], describe: Describe) -> dict[str, float]:
        """Sum the gradients of the micro-batches, weighted; clip; step. Gives the metrics, averaged by weight.

        An overflow under loss scaling leaves the update out. So does a NaN or infinite loss or gradient with
        `on_nan="skip"`; otherwise, and after 20 left out in a row, it raises NonFinite before any weight has changed.
        """
        with self.isolation.turn(self.phase):
            factor = self.phase.schedule(self.updates)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            buffers = self._buffers() if self.on_nan == "skip" else []
            try:
                attempt = self._attempt(batches)
                # One question a step, and the same answer on every rank: all take the step or none does.
                sound = not self.ranks.any(not attempt.sound)
                metrics = self._step(attempt) if sound else self._leave_out(attempt, describe, buffers)
            finally:
                for copy in self.held.copies:
                    copy.grad = None
        if sound:
            self._after()
        return metrics | self._state_metrics()

    def _attempt(self, batches: Sequence[Batch]) -> _Attempt:
        """Forward and backward of every micro-batch; the gradients, unscaled and averaged, and their norm."""
        # One micro-batch is its own mean: scaling by its weight and back would only cost a rounding.
        weighted = len(batches) > 1 or self.ranks.world > 1
        losses, moments = [], []
        for i, batch in enumerate(batches):
            moments.append(random_state())
            losses.append(self._backward(batch, weighted, first=i == 0, last=i == len(batches) - 1))
        # A batch in which nothing is learnt weighs nothing, and its gradient is zero.
        weight = self.ranks.total(sum(loss.weight for loss in losses)) or 1.0
        self.held.collect()
        self._name_unused()
        gradients = [p.grad for p in self.masters.values() if p.grad is not None]
        if not gradients:
            raise ValueError(f"Phase {self.phase.name!r}: its loss reached none of its {len(self.masters)} parameters")
        if self.scaler is not None:
            # What overflowed shows in the norm below, which is that of all shards.
            self.scaler.unscale(map(_local, gradients))
        if weighted:
            for gradient in gradients:
                gradient.div_(weight / self._unit)
        values = torch.stack([loss.value.float() for loss in losses]).tolist()
        lost = [(i, value) for i, value in enumerate(values) if not math.isfinite(value)]
        norm = self.ranks.size(torch.nn.utils.get_total_norm(gradients))
        return _Attempt(batches, losses, moments, gradients, norm, lost)

    def _name_unused(self) -> None:
        """Once, at the first update: parameters of the phase that its loss, on any rank, does not reach."""
        if self.updates or self._named:
            return
        self._named = True
        unused = [name for name, p in self.masters.items() if p.grad is None]
        if 0 < len(unused) < len(self.masters):
            listed = ", ".join(unused[:8]) + (", …" if len(unused) > 8 else "")
            self._say(f"phase {self.phase.name!r}: its loss does not reach {len(unused)} parameters: {listed}")

    def _backward(self, batch: Batch, weighted: bool, *, first: bool, last: bool) -> Loss:
        with self.ranks.accumulating(self._loss, last=last):
            with self.precision.autocast():
                loss = self._loss(batch.value)
            value = loss.value.float() if loss.value.dtype.itemsize == 2 else loss.value
            if weighted:
                if first and self.scaler is not None:
                    # The scale is found for a mean; a sum over a thousand tokens would overflow ten times to find it.
                    self._unit = _power_of_two(self.ranks.total(loss.weight))
                value = value * (loss.weight / self._unit)
            (value if self.scaler is None else self.scaler(value)).backward()
        # Values only: the graph must be free before the next micro-batch runs.
        metrics = {name: found.detach() if isinstance(found, Tensor) else found for name, found in loss.metrics.items()}
        return Loss(loss.value.detach(), metrics, loss.weight)

    def _step(self, attempt: _Attempt) -> dict[str, float]:
        if self.phase.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(list(self.masters.values()), self.phase.clip, attempt.norm)
        self.optimizer.step()
        self.held.publish()
        if self.scaler is not None:
            self.scaler.update(False)
        self.updates += 1
        self.skipped.in_a_row = 0
        return _average(attempt.losses, self.ranks) | {"gradient_norm": float(attempt.norm)}

    def _after(self) -> None:
        if self.phase.after is not None:
            with torch.no_grad():
                self.phase.after()
            self.held.adopt()
        if self.average is not None:
            self.average.update()

    def _leave_out(self, attempt: _Attempt, describe: Describe, buffers: Sequence[Buffer]) -> dict:
        """Count an update that was not applied, or raise NonFinite. Gives the metrics that are still true."""
        anywhere = self.ranks.any(bool(attempt.lost))
        overflow = self.scaler is not None and not anywhere
        self.skipped.in_a_row += 1
        if overflow and not self.skipped.too_many:
            assert self.scaler is not None
            self.scaler.update(True)
            self.skipped.overflow += 1
            return _average(attempt.losses, self.ranks)
        if self.on_nan == "stop" or self.skipped.too_many:
            more = f"; {IN_A_ROW} updates in a row were left out" if self.skipped.too_many else ""
            raise NonFinite(self._why(attempt, describe, anywhere, trace=True) + more)
        # Tracing costs a second pass, and once is enough to find the cause.
        self._say(f"{self._why(attempt, describe, anywhere, trace=not self.skipped.nan)}; this update is left out")
        self.skipped.nan += 1
        for buffer in buffers:
            buffer.restore()
        return {}

    def _why(self, attempt: _Attempt, describe: Describe, anywhere: bool, *, trace: bool) -> str:
        """What was non-finite, on which samples, and where it began."""
        name, numbers = f"phase {self.phase.name!r}", range(len(attempt.batches))
        if attempt.lost:
            i, value = attempt.lost[0]
            what, numbers = f"the loss is {value}", [i]
        elif anywhere:
            return f"{name}: the loss on another rank is NaN or infinite"
        else:
            what = f"the gradient's norm is {float(attempt.norm)}"
        ids = [one for i in numbers for one in attempt.batches[i].ids]
        parts = [f"{name}: {what}", f"samples {describe(ids)}"]
        if trace:
            found = (self._origin(attempt.batches[i], attempt.moments[i], bool(attempt.lost)) for i in numbers)
            parts.append(next(filter(None, found), "it was finite when these samples were run again"))
        return "; ".join(parts)

    def _origin(self, batch: Batch, moment: dict[str, Any], in_loss: bool) -> str | None:
        # Of sharded weights a forward pass gathers the shards of all ranks, and the others are not here.
        if any(hasattr(p, "device_mesh") for p in self.masters.values()):
            return "where it began is not traced with sharded weights"

        def run() -> Tensor:
            with self.precision.autocast():
                value = self.phase.loss(batch.value).value
            return value if self.scaler is None or in_loss else self.scaler(value)

        return where_it_began(self.isolation.modules, run, moment)

    def _buffers(self) -> list[Buffer]:
        """Every buffer as it is: a batch of NaNs spoils running statistics in the forward pass already."""
        return [buffer for module in self.isolation.modules.values() for buffer in buffers_of(module)]

    def _state_metrics(self) -> dict[str, float]:
        metrics = {"learning_rate": float(self.optimizer.param_groups[0]["lr"])}
        if self.scaler is not None:
            metrics |= {"loss_scale": float(self.scaler.scale), "skipped_overflow": self.skipped.overflow}
        if self.on_nan == "skip":
            metrics["skipped_nan"] = self.skipped.nan
        return metrics

    def report(self) -> list[str]:
        """What the user should hear at the end of a run: updates that were left out."""
        attempts = self.updates + self.skipped.overflow + self.skipped.nan
        return self.skipped.said(self.phase.name, attempts, float(self.scaler.scale) if self.scaler else None)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next update depends on besides the weights themselves."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
            "masters": list(self.held.copies),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "skipped": self.skipped.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`. A state without this run's loss scale or average leaves them as they are."""
        self.optimizer.load_state_dict(state["optimizer"])
        _like_their_weights(self.optimizer)
        self.updates, self.skipped = state["updates"], Skipped(**state["skipped"])
        with torch.no_grad():
            for copy, saved in zip(self.held.copies, state["masters"], strict=True):
                copy.copy_(saved)
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])


@torch.no_grad()
def _like_their_weights(optimizer: Any) -> None:
    """Give moments the strides of their weights again, which files do not keep.

    Fused updates run through both in memory's order, so with weights in channels-last order the last bits would differ.
    """
    for parameter, moments in getattr(optimizer, "state", {}).items():
        for name, value in moments.items() if isinstance(moments, dict) else ():
            if not (isinstance(value, Tensor) and isinstance(parameter, Tensor) and value.shape == parameter.shape):
                continue
            if type(value) is Tensor and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _local(gradient: Tensor) -> Tensor:
    """The part of a sharded gradient that lies on this rank."""
    part: Any = gradient
    return part.to_local() if hasattr(part, "to_local") else part


def _power_of_two(x: float) -> float:
    """The power of two nearest to x on a logarithmic scale: dividing by it is exact."""
    return 2.0 ** round(math.log2(x)) if x > 0 else 1.0


def _average(losses: Sequence[Loss], ranks: Ranks) -> dict[str, float]:
    """Means over the micro-batches of all ranks, weighted as the gradient was."""
    names = ["loss", *losses[0].metrics]
    rows = [[loss.value, *(loss.metrics[name] for name in names[1:])] for loss in losses]
    table = torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)
    weights = torch.tensor([loss.weight for loss in losses], dtype=torch.float64)
    total, *sums = ranks.sums([float(weights.sum()), *(weights @ table).tolist()])
    return {name: value / (total or 1.0) for name, value in zip(names, sums, strict=True)}


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
