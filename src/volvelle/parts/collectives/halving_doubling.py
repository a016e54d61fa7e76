"""Recursive halving reduce-scatter and recursive doubling all-gather; together Rabenseifner's all-reduce.

Thakur, Rabenseifner and Gropp 2005, Optimization of collective communication operations in MPICH, sections 4.3, 4.4.
Reduce-scatter: with the peer half the remaining range away, swap halves of the vector and reduce the half that is
kept; log2 p rounds. All-gather: the same rounds backwards, each doubling what is known.

p a power of two: sent a rank 2 (p - 1) V / p bytes, like the ring, in 2 log2 p messages instead of 2 (p - 1);
time 2 log2 p alpha + 2 (p - 1)/p V beta + (p - 1)/p V gamma. Other p: p - p' pairs fold to p' = 2^floor(log2 p) ranks
first and unfold at the end, 2 (p - p') V more bytes in all, and 2 alpha + 2 V beta + V gamma more time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from volvelle.parts.collectives.blocks import Combine, even_bounds
from volvelle.parts.collectives.transfer import Fold, swap_reduce
from volvelle.parts.collectives.wire import Wire


def all_reduce(wire: Wire, x: torch.Tensor, combine: Combine) -> None:
    """Reduce the flat vector x over all ranks, in place."""
    fold = Fold(wire)
    fold.reduce_in(x, combine)
    if fold.core is not None:
        bounds = even_bounds(x.numel(), fold.core.size)
        _halve(fold.core, x, bounds, combine)
        _double(fold.core, x, bounds)
    fold.hand(x, back=True)


def reduce_scatter(wire: Wire, x: torch.Tensor, bounds: Sequence[int], combine: Combine) -> None:
    """Afterwards block r of x holds the reduction over all ranks; the other blocks hold partial results."""
    fold = Fold(wire)
    fold.reduce_in(x, combine)
    if fold.core is not None:
        _halve(fold.core, x, fold.bounds(bounds), combine)
    odd = wire.rank | 1
    if fold.partner is not None:
        fold.hand(x[bounds[odd] : bounds[odd + 1]], back=True)


def all_gather(wire: Wire, x: torch.Tensor, bounds: Sequence[int]) -> None:
    """Block r of x is this rank's; afterwards every block is there."""
    fold = Fold(wire)
    odd = wire.rank | 1
    if fold.partner is not None:
        fold.hand(x[bounds[odd] : bounds[odd + 1]], back=False)
    if fold.core is not None:
        _double(fold.core, x, fold.bounds(bounds))
    if fold.partner is not None:  # everything but the waiting rank's own block
        fold.hand(x[: bounds[odd]], back=True)
        fold.hand(x[bounds[odd + 1] :], back=True)


def _rounds(p: int, r: int) -> Iterator[tuple[int, tuple[int, int], tuple[int, int]]]:
    """For each halving: the peer, the blocks that this rank keeps, and those it gives away."""
    low, high = 0, p
    while high - low > 1:
        half = (high - low) // 2
        middle = low + half
        if r < middle:
            yield r + half, (low, middle), (middle, high)
            high = middle
        else:
            yield r - half, (middle, high), (low, middle)
            low = middle


def _halve(wire: Wire, x: torch.Tensor, bounds: Sequence[int], combine: Combine) -> None:
    for peer, keep, give in _rounds(wire.size, wire.rank):
        swap_reduce(wire, _blocks(x, bounds, give), _blocks(x, bounds, keep), peer, combine)


def _double(wire: Wire, x: torch.Tensor, bounds: Sequence[int]) -> None:
    for peer, keep, give in reversed(list(_rounds(wire.size, wire.rank))):
        wire.exchange(_blocks(x, bounds, keep), _blocks(x, bounds, give), peer)


def _blocks(x: torch.Tensor, bounds: Sequence[int], span: tuple[int, int]) -> torch.Tensor:
    return x[bounds[span[0]] : bounds[span[1]]]
