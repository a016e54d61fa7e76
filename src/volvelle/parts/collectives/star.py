"""The naive way, for comparison: everything to rank 0, and from it to everybody.

Also 2 (p - 1) V bytes in all, but every one through rank 0: its time is 2 (p - 1)(alpha + V beta) + (p - 1) V gamma,
which grows with p where the ring's bandwidth term does not (Patarasuk and Yuan 2009, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from volvelle.parts.collectives.blocks import Combine
from volvelle.parts.collectives.transfer import swap_reduce
from volvelle.parts.collectives.wire import Wire


def all_reduce(wire: Wire, x: torch.Tensor, combine: Combine) -> None:
    """Reduce the flat vector x over all ranks, in place."""
    _reduce(wire, x, combine)
    _broadcast(wire, x)


def reduce_scatter(wire: Wire, x: torch.Tensor, bounds: Sequence[int], combine: Combine) -> None:
    """Afterwards block r of x holds the reduction over all ranks; the other blocks hold partial results."""
    _reduce(wire, x, combine)
    if wire.rank:
        wire.wait(wire.receive(x[bounds[wire.rank] : bounds[wire.rank + 1]], 0))
    else:
        wire.wait(*[wire.send(x[bounds[peer] : bounds[peer + 1]], peer) for peer in range(1, wire.size)])


def all_gather(wire: Wire, x: torch.Tensor, bounds: Sequence[int]) -> None:
    """Block r of x is this rank's; afterwards every block is there."""
    if wire.rank:
        wire.wait(wire.send(x[bounds[wire.rank] : bounds[wire.rank + 1]], 0))
    else:
        wire.wait(*[wire.receive(x[bounds[peer] : bounds[peer + 1]], peer) for peer in range(1, wire.size)])
    _broadcast(wire, x)


def _reduce(wire: Wire, x: torch.Tensor, combine: Combine) -> None:
    if wire.rank:
        swap_reduce(wire, x, None, 0, combine)
        return
    for peer in range(1, wire.size):
        swap_reduce(wire, None, x, peer, combine)


def _broadcast(wire: Wire, x: torch.Tensor) -> None:
    if wire.rank:
        wire.wait(wire.receive(x, 0))
    else:
        wire.wait(*[wire.send(x, peer) for peer in range(1, wire.size)])
