"""How a flat vector is cut into blocks and segments, and how two of them are combined."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

Combine = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
"""combine(a, b, out) writes a op b into `out`, which is `a` or `b`."""


def _add(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.add(a, b, out=out)


_COMBINE: dict[dist.ReduceOp.RedOpType, Combine] = {
    dist.ReduceOp.SUM: _add,
    dist.ReduceOp.AVG: _add,  # divided by p at the end
    dist.ReduceOp.PRODUCT: lambda a, b, out: torch.mul(a, b, out=out),
    dist.ReduceOp.MAX: lambda a, b, out: torch.maximum(a, b, out=out),
    dist.ReduceOp.MIN: lambda a, b, out: torch.minimum(a, b, out=out),
    dist.ReduceOp.BAND: lambda a, b, out: torch.bitwise_and(a, b, out=out),
    dist.ReduceOp.BOR: lambda a, b, out: torch.bitwise_or(a, b, out=out),
    dist.ReduceOp.BXOR: lambda a, b, out: torch.bitwise_xor(a, b, out=out),
}


def combiner(call: str, op: dist.ReduceOp.RedOpType, dtype: torch.dtype, device: torch.device) -> Combine:
    """The reduction for `op`.

    Not every one is commutative bit for bit (the maximum of 0 and -0, two NaNs, complex products), so where two ranks
    compute the same value both take the lower rank's operand first: all ranks get the same bits.

    Raises:
        ValueError: an op that torch knows and this file does not (PREMUL_SUM).
        TypeError: an op without meaning for the dtype: AVG of integers, MAX and MIN of complex numbers, bits of floats;
            or one that torch does not compute there. After the first message it would be too late to find out.
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
    if not _computed(op, dtype, device):
        raise TypeError(f"{call}: torch does not compute {op} of {dtype} on {device.type}")
    return _COMBINE[op]


@functools.cache
def _computed(op: dist.ReduceOp.RedOpType, dtype: torch.dtype, device: torch.device) -> bool:
    try:
        one = torch.empty(1, dtype=dtype, device=device)
        _COMBINE[op](one, one.clone(), one)
    except (NotImplementedError, RuntimeError):
        return False
    return True


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
