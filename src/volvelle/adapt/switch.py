"""Which of a model's adapters acts: one for the whole batch, one a row, or none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from volvelle.errors import VolvelleError

Selection = str | None | tuple[str | None, ...]
"""An adapter's name for all rows, None for the base model, or one of these for each row of the batch."""


@dataclass
class Switch:
    """One a model, shared by all its adapter layers, which ask it in every forward.

    `chosen` is what the next forward uses. `trained` is what the last forward with gradients used.
    """

    chosen: Selection = None
    trained: Selection = None

    def selection(self) -> Selection:
        """What this forward uses.

        A layer that gradient checkpointing computes again during the backward pass must do what it did before; when
        another adapter was chosen in between, raises VolvelleError.
        """
        if torch.compiler.is_compiling():
            return self.chosen
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass
            if self.chosen != self.trained:
                raise VolvelleError(
                    f"adapters: the backward pass recomputes a layer for {self.trained!r}, but {self.chosen!r} is "
                    "chosen now",
                    tip="with gradient checkpointing, call backward() inside `with volvelle.adapt.using(…)`",
                )
        elif torch.is_grad_enabled():
            self.trained = self.chosen
        return self.chosen

    @contextlib.contextmanager
    def using(self, selection: str | Sequence[str | None] | None) -> Iterator[None]:
        """Choose for the length of the block."""
        before = self.chosen
        self.chosen = selection if selection is None or isinstance(selection, str) else tuple(selection)
        try:
            yield
        finally:
            self.chosen = before


def check_rows(rows: Sequence[str | None], batch: int, where: str) -> None:
    """Raise VolvelleError unless one adapter was named for each of the `batch` rows that arrived at a layer."""
    if len(rows) != batch:
        raise VolvelleError(
            f"adapters: {len(rows)} rows were named, but {where} got a batch of {batch}",
            tip="name one adapter, or None, for every row of the batch",
        )
