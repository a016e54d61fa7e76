"""The processes that train together. This is the case of one; the loop asks it everything that many would change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from volvelle.train.checkpoint import Checkpoints
from volvelle.train.contracts import Batches
from volvelle.train.options import FitOptions
from volvelle.train.phase import Loss, Phase

T = TypeVar("T")


class Ranks:
    """One process: nothing to wrap, nothing to share out, nothing to agree on.

    Everything that one process may decide and many must decide together is a question here; `distributed.Group` answers
    for many. All ranks ask the same questions in the same order.
    """

    rank = 0
    world = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that prints, writes the run folder and evaluates: rank 0."""
        return self.rank == 0

    def split(self, loader: Batches) -> Batches:
        """The loader as this rank sees it: every `world`-th micro-batch of the same sequence."""
        return loader

    def prepare(self, modules: Mapping[str, nn.Module], methods: Sequence[str] = ()) -> None:
        """Make the weights ready before the phases are asked for: shard them. `methods` are ways in beside forward."""

    def seed(self, seed: int) -> None:
        """Seed the generators apart, once all ranks have made the same initial weights: dropout must differ."""

    def wrap(self, phase: Phase, modules: Mapping[str, nn.Module]) -> Callable[[Any], Loss]:
        """The callable that computes the phase's loss, with whatever averages its gradients over ranks built in."""
        return phase.loss

    def accumulating(self, loss: Callable[[Any], Loss], *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around one micro-batch; gradients travel between ranks only in the `last` of an update."""
        return contextlib.nullcontext()

    def total(self, weight: float) -> float:
        """Sum of the ranks' weights, divided by the number of ranks (their gradients arrive averaged)."""
        return weight

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks, in fp64, of each value."""
        return list(values)

    def size(self, norm: Tensor) -> Tensor:
        """The whole gradient's norm, from that of what this rank has of it."""
        return norm

    def any(self, flag: bool) -> bool:
        """Whether any rank raised the flag: all do the same thing or none does it."""
        return flag

    def heard(self, name: str | None) -> str | None:
        """The signal that any rank has heard: all stop together or none does."""
        return name

    def even(self, modules: Mapping[str, nn.Module]) -> None:
        """After a step: buffers that the ranks' different samples have moved apart become their mean."""

    def share(self, value: T) -> T:
        """Rank 0's value."""
        return value

    def collect(self, value: T) -> list[T]:
        """Every rank's value, in order of rank."""
        return [value]

    def whole(self, modules: Mapping[str, nn.Module]) -> contextlib.AbstractContextManager[None]:
        """While the block runs, rank 0 alone can run the modules: every weight is whole."""
        return contextlib.nullcontext()

    def finish(self, modules: Mapping[str, nn.Module]) -> None:
        """Undo `prepare`: plain modules with plain weights again."""

    def checkpoints(self, folder: Path, options: FitOptions) -> Checkpoints:
        """The checkpoints of a run in that folder."""
        return Checkpoints(folder, keep_last=options.keep_last)

    def guard(self, kept: Callable[[], str]) -> contextlib.AbstractContextManager[None]:
        """Around the loop: what fails because another rank is gone is raised as `RankLost`, which names that rank.

        `kept` says what is left of the run (the newest checkpoint), for the message.
        """
        return contextlib.nullcontext()
