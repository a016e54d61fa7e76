"""How a flat vector is cut into blocks and segments, and how two of them are combined."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""combine(mine, theirs) reduces in place into `mine`."""

_COMBINE: dict[dist.ReduceOp.RedOpType, Combine] = {
    dist.ReduceOp.SUM: lambda mine, theirs: mine.add_(theirs),
    dist.ReduceOp.AVG: lambda mine, theirs: mine.add_(theirs),  # divided by p at the end, in `finish`
    dist.ReduceOp.PRODUCT: lambda mine, theirs: mine.mul_(theirs),
    dist.ReduceOp.MAX: lambda mine, theirs: torch.maximum(mine, theirs, out=mine),
    dist.ReduceOp.MIN: lambda mine, theirs: torch.minimum(mine, theirs, out=mine),
    dist.ReduceOp.BAND: lambda mine, theirs: mine.bitwise_and_(theirs),
    dist.ReduceOp.BOR: lambda mine, theirs: mine.bitwise_or_(theirs),
    dist.ReduceOp.BXOR: lambda mine, theirs: mine.bitwise_xor_(theirs),
}


def combiner(call: str, op: dist.ReduceOp.RedOpType, dtype: torch.dtype) -> Combine:
    """The in-place reduction for `op`. Every one is commutative bit for bit, so all ranks get the same bits.

    Raises:
        ValueError: an op that torch knows and this file does not (PREMUL_SUM).
        TypeError: an op without meaning for the dtype: AVG of integers, MAX and MIN of complex numbers, bits of floats.
    """
    if op not in _COMBINE:
        raise ValueError(f"{call}: op must be one of {', '.join(str(known) for known in _COMBINE)}, got {op}")
    if op == dist.ReduceOp.AVG and not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"{call}: AVG needs a floating dtype, got {dtype}")
    if op in {dist.ReduceOp.MAX, dist.ReduceOp.MIN} and dtype.is_complex:
        raise TypeError(f"{call}: complex numbers have no order, got {op} of {dtype}")
    if op in {dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR} and (
        dtype.is_floating_point or dtype.is_complex
    ):
        raise TypeError(f"{call}: {op} needs an integer or boolean dtype, got {dtype}")
    return _COMBINE[op]


def even_bounds(count: int, parts: int) -> list[int]:
    """Where to cut `count` elements into `parts` blocks whose sizes differ by at most one: parts + 1 offsets.

    >>> even_bounds(10, 4)
    [0, 3, 6, 8, 10]
    """
    size, extra = divmod(count, parts)
    return [i * size + min(i, extra) for i in range(parts + 1)]


def bounds_of(sizes: Sequence[int]) -> list[int]:
    """Offsets of blocks of the given sizes.

    >>> bounds_of([3, 0, 2])
    [0, 3, 3, 5]
    """
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    return bounds


def segments(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """Cut start .. stop into pieces of at most `most` elements; nothing for an empty block.

    >>> segments(3, 10, 4)
    [(3, 7), (7, 10)]
    """
    return [(i, min(i + most, stop)) for i in range(start, stop, most)]
