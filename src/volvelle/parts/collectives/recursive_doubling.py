"""Recursive doubling: the fewest rounds, the whole vector in each; for short vectors.

Thakur, Rabenseifner and Gropp 2005, sections 4.1 (all-gather), 4.2 (reduce-scatter) and 4.4 (all-reduce).
In round k every rank swaps with the rank 2^k away, so after round k groups of 2^(k + 1) ranks agree.

All-reduce, p a power of two: sent a rank V log2 p bytes in log2 p messages; time log2 p (alpha + V beta + V gamma).
Reduce-scatter: in round k everything but what the own group of 2^k will keep. All-gather: the known 2^k blocks, as in
halving_doubling.py. Other p: folding as there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from volvelle.parts.collectives.blocks import Combine
from volvelle.parts.collectives.halving_doubling import all_gather as all_gather  # its second half is this algorithm
from volvelle.parts.collectives.transfer import Fold, swap_reduce
from volvelle.parts.collectives.wire import Wire


def all_reduce(wire: Wire, x: torch.Tensor, combine: Combine) -> None:
    """Reduce the flat vector x over all ranks, in place."""
    fold = Fold(wire)
    fold.reduce_in(x, combine)
    if fold.core is not None:
        distance = 1
        while distance < fold.core.size:
            swap_reduce(fold.core, x, x, fold.core.rank ^ distance, combine)
            distance *= 2
    fold.hand(x, back=True)


def reduce_scatter(wire: Wire, x: torch.Tensor, bounds: Sequence[int], combine: Combine) -> None:
    """Afterwards block r of x holds the reduction over all ranks; the other blocks hold partial results."""
    fold = Fold(wire)
    fold.reduce_in(x, combine)
    if fold.core is not None:
        _scatter(fold.core, x, fold.bounds(bounds), combine)
    if fold.partner is not None:
        odd = wire.rank | 1
        fold.hand(x[bounds[odd] : bounds[odd + 1]], back=True)


def _scatter(wire: Wire, x: torch.Tensor, bounds: Sequence[int], combine: Combine) -> None:
    scratch = torch.empty_like(x)
    distance = 1
    while distance < wire.size:
        peer = wire.rank ^ distance
        mine, theirs = _outside(bounds, wire.rank, distance), _outside(bounds, peer, distance)
        transfers = [wire.receive(scratch[i:j], peer) for i, j in theirs]
        transfers += [wire.send(x[i:j], peer) for i, j in mine]
        wire.wait(*transfers)
        for i, j in theirs:
            combine(x[i:j], scratch[i:j], x[i:j])
        distance *= 2


def _outside(bounds: Sequence[int], r: int, distance: int) -> list[tuple[int, int]]:
    """What rank r sends in the round: all but the blocks of its own group of `distance` ranks."""
    first = r // distance * distance
    return [(0, bounds[first]), (bounds[first + distance], bounds[-1])]
