"""Phases and objectives: what is trained, how often, and on which loss (a language model has one phase, a GAN two).

A step of the loop goes through the objective's phases in order. Each phase owns some parameters and one optimiser, and
changes nothing else: while it runs, parameters outside it ask for no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from volvelle.train.options import FitOptions
from volvelle.train.schedule import Schedule, constant

Optimizer = torch.optim.Optimizer
OptimizerFactory = Callable[[Mapping[str, nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Loss:
    """One micro-batch's loss: a scalar mean `value`, and `weight`, the number of tokens or samples it is the mean of.

    Micro-batches of one update are averaged by weight, so four batches of unequal length train exactly like one large
    batch. `metrics` are further numbers to log, averaged in the same way.
    """

    value: Tensor
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True)
class Phase:
    """One player: its named parameters, its loss, its optimiser, and when it plays.

    `loss(batch)` gives a `Loss`. The phase plays on every `every`-th step from step `start` on, `repeats` updates in a
    row. Updates of a step share its micro-batches, except that every repeat after a phase's first draws new ones (the
    critic of WGAN); later phases use the newest. `schedule` maps the phase's finished updates to a factor of the
    learning rate, `clip` is the largest gradient norm, `after` runs after each update (clamping a critic's weights).
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    loss: Callable[[Any], Loss]
    optimizer: OptimizerFactory
    schedule: Schedule = field(default_factory=constant)
    every: int = 1
    start: int = 0
    repeats: int = 1
    clip: float | None = None
    after: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if not self.parameters:
            raise ValueError(f"Phase {self.name!r}: no parameters to train")
        if min(self.every, self.repeats) < 1 or self.start < 0:
            raise ValueError(
                f"Phase {self.name!r}: every and repeats must be at least 1 and start at least 0, "
                f"got every={self.every}, repeats={self.repeats}, start={self.start}"
            )

    def plays(self, step: int) -> bool:
        """Whether this phase has a turn at `step` (counted from 0)."""
        return step >= self.start and (step - self.start) % self.every == 0


class Objective:
    """What `fit` trains. Subclasses give `modules` and `phases`, and may give `evaluate`, `units` and `after_step`."""

    def modules(self) -> Mapping[str, nn.Module]:
        """Every module with weights or buffers, by name. Trained weights and buffers go into checkpoints.

        Buffers that are not persistent do not: a resumed run has them as their modules make them.
        """
        raise NotImplementedError

    def phases(self, steps: int) -> Sequence[Phase]:
        """The phases in playing order; `steps` is the length of the run, for the schedules."""
        raise NotImplementedError

    forward_methods: Sequence[str] = ()
    """Methods of the modules, beside forward, through which the loss runs them: sharding gathers weights for them."""
    best: tuple[str, str] = ("loss", "min")
    """The held-out metric that decides which checkpoint is best, and whether less ("min") or more ("max") is."""

    def train_mode(self) -> None:
        """Runs before the first step. Puts every module in training mode; override to keep parts in eval mode."""
        for module in self.modules().values():
            module.train()

    def evaluate(self) -> Mapping[str, float]:
        """Held-out metrics; an empty mapping when there is nothing to measure. Runs in eval mode without gradients."""
        return {}

    def units(self, batch: Any) -> tuple[float, str]:
        """How much work a micro-batch is, for the rate shown: (samples or tokens, the word for them)."""
        return 1.0, "batches"

    def after_step(self, step: int) -> None:
        """Runs after every step, before evaluation and checkpoints (moving averages of weights)."""

    def state_dict(self) -> dict[str, Any]:
        """Anything else the next step depends on, as nested plain data and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""


def adamw(
    options: FitOptions,
    *,
    share: Callable[[str], float] = lambda name: 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> OptimizerFactory:
    """AdamW (Loshchilov & Hutter 2019) at the options' peak rate, with decay on matrices only.

    Biases, norms' gains and other vectors are not decayed: pulling a gain towards zero only fights the loss. `share`
    says of each weight, by its name, what share of the rate it learns at; the largest is the one that is logged.
    """

    def build(parameters: Mapping[str, nn.Parameter]) -> Optimizer:
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, p in parameters.items():
            groups.setdefault((-share(name), p.ndim < 2), []).append(p)
        chosen = [
            {
                "params": members,
                "lr": -rate * options.learning_rate,
                "weight_decay": 0.0 if vectors else options.weight_decay,
            }
            for (rate, vectors), members in sorted(groups.items(), key=lambda item: item[0])
        ]
        return torch.optim.AdamW(chosen, lr=options.learning_rate, betas=betas, fused=_fusable(parameters.values()))

    return build


def _fusable(parameters: Iterable[nn.Parameter]) -> bool:
    """The fused kernel wants one device and floating-point weights; it saves a pass over memory per operation."""
    found = list(parameters)
    return len({p.device for p in found}) == 1 and all(p.is_floating_point() for p in found)


def trainable(module: nn.Module, prefix: str = "") -> dict[str, nn.Parameter]:
    """The module's parameters that ask for a gradient, by name, each once even where tied.

    >>> list(trainable(nn.Linear(2, 1)))
    ['weight', 'bias']
    """
    return {prefix + name: p for name, p in module.named_parameters() if p.requires_grad}
