"""Binomial trees: reduce to rank 0, then broadcast (or scatter) from it.

Thakur, Rabenseifner and Gropp 2005, sections 4.2 and 4.5 (reduce, broadcast, gather and scatter by binomial tree).
In round k the ranks whose lowest set bit is 2^k send to the rank that lacks it; any p, no folding.

All-reduce: sent in all 2 (p - 1) V bytes, as the ring, but rank 0 receives and sends up to ceil(log2 p) V;
time 2 ceil(log2 p) (alpha + V beta) + ceil(log2 p) V gamma.
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
    parent, children = _relatives(wire)
    if parent is not None:
        wire.wait(wire.receive(_subtree(wire, x, bounds, wire.rank), parent))
    for child in reversed(children):
        wire.wait(wire.send(_subtree(wire, x, bounds, child), child))


def all_gather(wire: Wire, x: torch.Tensor, bounds: Sequence[int]) -> None:
    """Block r of x is this rank's; afterwards every block is there."""
    parent, children = _relatives(wire)
    wire.wait(*[wire.receive(_subtree(wire, x, bounds, child), child) for child in children])
    if parent is not None:
        wire.wait(wire.send(_subtree(wire, x, bounds, wire.rank), parent))
    _broadcast(wire, x)


def _relatives(wire: Wire) -> tuple[int | None, list[int]]:
    """The parent (None for rank 0) and the children, nearest first."""
    r, bit, children = wire.rank, 1, []
    while bit < wire.size and not r & bit:
        if r + bit < wire.size:
            children.append(r + bit)
        bit *= 2
    return (r - bit if r else None), children


def _subtree(wire: Wire, x: torch.Tensor, bounds: Sequence[int], root: int) -> torch.Tensor:
    """The blocks of `root` and all below it: neighbouring ranks, as many as its lowest set bit says."""
    return x[bounds[root] : bounds[min(root + (root & -root or wire.size), wire.size)]]


def _reduce(wire: Wire, x: torch.Tensor, combine: Combine) -> None:
    parent, children = _relatives(wire)
    for child in children:
        swap_reduce(wire, None, x, child, combine)
    if parent is not None:
        swap_reduce(wire, x, None, parent, combine)


def _broadcast(wire: Wire, x: torch.Tensor) -> None:
    parent, children = _relatives(wire)
    if parent is not None:
        wire.wait(wire.receive(x, parent))
    wire.wait(*[wire.send(x, child) for child in reversed(children)])  # the largest subtree first
