"""The best weights of a training by one figure, kept in main memory while it goes on, and objectives that keep them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from volvelle.train.phase import Objective


class BestWeights:
    """A copy of the model's state as it was when the figure was highest; it travels in checkpoints.

    >>> import torch
    >>> model = nn.Linear(1, 1)
    >>> best = BestWeights(model)
    >>> for value, weight in ((0.5, 1.0), (0.7, 2.0), (0.6, 3.0)):
    ...     _ = torch.nn.init.constant_(model.weight, weight)
    ...     best.offer(value)
    >>> best.use()
    >>> model.weight.item()
    2.0
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.weights: dict[str, Tensor] = {}
        self.value = -2.0  # figures are shares, -1 where there was nothing to measure

    def offer(self, value: float) -> None:
        """Copy the model's state where `value` is the highest so far; of equal ones the first stays."""
        if value > self.value:
            self.value = value
            self.weights = {name: x.detach().cpu().clone() for name, x in self.model.state_dict().items()}

    def use(self) -> None:
        """Put the copy into the model; nothing happens where there is none."""
        if self.weights:
            self.model.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """The copy and its figure."""
        return {"kept": self.weights, "kept_at": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.weights, self.value = dict(state["kept"]), state["kept_at"]


class BestMoment(Objective):
    """An objective on pictures that counts its steps and keeps `model` as at its best; both travel in checkpoints.

    Heirs offer the figure of each evaluation to `best_weights`.
    """

    model: Any

    def __init__(self, model: nn.Module):
        self.step = 0
        self.model, self.best_weights = model, BestWeights(model)

    def modules(self) -> Mapping[str, nn.Module]:
        """The model."""
        return {"model": self.model}

    def units(self, batch: Any) -> tuple[float, str]:
        """Pictures, or crops of them."""
        return float(len(batch["images"])), "images"

    def after_step(self, step: int) -> None:
        """Count."""
        self.step = step + 1

    def use_best(self) -> None:
        """Put the best weights into the model; nothing happens where none were kept."""
        self.best_weights.use()

    def state_dict(self) -> dict[str, Any]:
        """The step, and the best weights."""
        return {"step": self.step} | self.best_weights.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.step = state["step"]
        self.best_weights.load_state_dict(state)
