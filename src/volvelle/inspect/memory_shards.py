"""What a rank of FSDP holds whole, entry by entry of a traced step; all else of what persists it holds a share of.

As training shards: every block (`units_of`) is a unit, and all else is one more, the root. A unit's weights are
gathered before it runs and dropped behind it; in the backward pass those of the next one are fetched ahead. When a
unit's gradients are all there, they move into one buffer, of which each rank gets the sum of its share; the buffer
stays until the next unit's is filled. The root's weights stay whole from the forward pass on, and its gradients wait
for the end of the backward pass.

Zhao et al. 2023, "PyTorch FSDP", sections 3.2 and 3.3; torch.distributed.fsdp.fully_shard of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from volvelle.inspect.memory_ledger import Entry
from volvelle.inspect.memory_session import Trace
from volvelle.inspect.memory_step import TrainingStep, units_of


class Shards:
    """Follow a trace's entries in order; `gradients` and `communication` are of the moment reached."""

    def __init__(self, trace: Trace, step: TrainingStep, ranks: int):
        units, root = units_of(step.model)
        self._trace, self._ranks = trace, ranks
        self._root, self._units = _bytes(root), [_bytes(unit) for unit in units]
        self._buffers = [_bytes([p for p in unit if p.requires_grad]) for unit in units]
        self._wanted = [0] * len(units)
        self._root_wanted = 0
        for block, unit in trace.gradient_units.items():
            size = trace.ledger.blocks[block].size
            if unit is None:
                self._root_wanted += size
            else:
                self._wanted[unit] += size
        self._found, self._root_found = [0] * len(units), 0
        self._current = len(units) - 1  # the unit whose backward pass runs, or the next one's that will
        self._reduced, self._buffer = 0, 0
        self._full: int | None = None
        # Of earlier micro-batches a share of all gradients is there; what is followed is the first one.
        earlier = self._root_wanted + sum(self._wanted) if step.options.accumulated else 0
        self._earlier = earlier / ranks

    def follow(self, entry: Entry) -> None:
        """Go on by one entry."""
        if self._full is not None:  # what was the last entry of a unit's backward pass
            self._reduced += self._wanted[self._full]
            self._buffer, self._current, self._full = self._buffers[self._full], self._full - 1, None
        if entry.block not in self._trace.gradient_units:
            return
        unit, change = self._trace.gradient_units[entry.block], entry.sign * self._trace.ledger.blocks[entry.block].size
        if unit is None:
            self._root_found += change
        else:
            self._found[unit] += change
            if self._found[unit] == self._wanted[unit]:
                self._full = unit

    def gradients(self, whole: float) -> float:
        """What is left of `whole` bytes of gradients: of units that are through, a share; and of earlier ones."""
        return whole - self._reduced + self._reduced / self._ranks + self._earlier

    def communication(self, index: int, phase: str) -> int:
        """Bytes of whole weights and of the buffer that gradients travel in, at entry `index`."""
        if phase == "forward":  # a block's weights and the buffer they came in; the loss needs none
            return self._root + (2 * max(self._units, default=0) if index in self._trace.in_blocks else 0)
        if self._current < 0 and self._root_found == self._root_wanted:  # last the root's own gradients travel
            return max(self._root + self._buffer, self._root_found)
        if self._root_wanted and not self._root_found and not self._reduced:  # the loss, whose end fetches one block
            return self._root + sum(self._units[-1:])
        return self._root + sum(self._units[max(0, self._current - 1) : self._current + 1]) + self._buffer


def _bytes(unit: Sequence[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in unit)
