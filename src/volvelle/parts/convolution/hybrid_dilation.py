"""Hybrid dilation rates (HDC): Wang et al. 2018, "Understanding Convolution for Semantic Segmentation", section 3.2.

n layers of kernel K with rates r_1, .., r_n. The largest distance between two inputs that layers i to n see is

    M_i = max(M_(i+1) - 2 r_i,  M_(i+1) - 2 (M_(i+1) - r_i),  r_i),     M_n = r_n

and no input is missed when r_1 = 1 and M_2 <= K. The rates must share no factor, as 2, 4, 8 do: pixels that are an odd
number apart would see nothing of each other. For rising rates the first rule says r_i <= K + 2 (r_2 + .. + r_(i-1)). It
is exact for K = 3 and on the safe side for larger kernels; exact for all is r_i <= 1 + (K - 1) (r_1 + .. + r_(i-1)),
which for K = 2 asks more and is kept too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from volvelle.export import export


@export("functional.hybrid_dilation_rates", stable=True)
def hybrid_dilation_rates(depth: int, kernel: int = 3, *, field: int | None = None) -> tuple[int, ...]:
    """Choose rising rates for stacked atrous convolutions that leave no holes: M_2 <= K, pairwise without a factor.

    `depth` is the number of layers, `kernel` their K. Without `field` every rate is the largest that the rules leave
    after those before. With it the field 1 + (K - 1) Σ r_i is the smallest that is not below it; among equals, the one
    with the smallest M_2 and then the smallest last rates. To replace n layers of rate r, ask for their field. Raises
    ValueError for a depth below 1, a kernel below 2, and a field below or beyond what such layers have. Wang et al.
    2018, section 3.2.

    >>> hybrid_dilation_rates(3)
    (1, 3, 8)
    >>> hybrid_dilation_rates(3, field=13)  # as three layers of rate 2
    (1, 2, 3)
    >>> hybrid_dilation_rates(3, field=17)  # the paper's example
    (1, 2, 5)
    """
    if depth < 1 or kernel < 2:
        raise ValueError(f"hybrid_dilation_rates: depth must be >= 1 and kernel >= 2, got {depth} and {kernel}")
    largest = _largest(depth, kernel)
    if field is None:
        return largest
    reach = range(1 + (kernel - 1) * depth, 2 + (kernel - 1) * sum(largest))
    if field not in reach:
        raise ValueError(
            f"hybrid_dilation_rates: {depth} layers of kernel {kernel} have fields from {reach[0]} to {reach[-1]} "
            f"without holes, got field {field}"
        )
    for total in range(-((1 - field) // (kernel - 1)), sum(largest)):
        for distance in range(1, kernel + 1):
            found = next(_rising(depth, total, kernel, distance), None)
            if found is not None:
                return found
    return largest


def largest_distance(rates: Sequence[int]) -> int:
    """M_2 of the paper's recursion for rates in the order of the layers; for a single layer its rate.

    >>> largest_distance((1, 2, 5)), largest_distance((1, 2, 9))
    (2, 5)
    """
    distance = rates[-1]
    for r in reversed(rates[1:-1]):
        distance = max(distance - 2 * r, distance - 2 * (distance - r), r)
    return distance


def _limit(before: Sequence[int], kernel: int, distance: int) -> int:
    """The largest rate that may follow those before with M_2 <= distance and no hole."""
    return min(distance + 2 * sum(before[1:]), 1 + (kernel - 1) * sum(before)) if before else 1


def _largest(depth: int, kernel: int) -> tuple[int, ...]:
    rates: list[int] = []
    for _ in range(depth):
        limit = _limit(rates, kernel, kernel)
        rates.append(next(r for r in range(limit, 0, -1) if all(math.gcd(r, other) == 1 for other in rates)))
    return tuple(rates)


def _rising(
    depth: int, total: int, kernel: int, distance: int, above: tuple[int, ...] = ()
) -> Iterator[tuple[int, ...]]:
    """Admissible rates with this sum, chosen from the last to the first, small ones first."""
    if depth == 1:
        if total == 1:
            yield (1, *above)
        return
    before: list[int] = []  # the largest rates that the others could have, so the last must reach the rest
    for _ in range(depth - 1):
        before.append(_limit(before, kernel, distance))
    lowest, highest = max(-(-total // depth), total - sum(before)), above[0] if above else total
    for r in range(lowest, min(highest, total - depth + 1) + 1):
        rest = total - r
        # The others sum to `rest`, the first of them is 1, and the layer must not leave a hole between them.
        if r > min(distance + 2 * (rest - 1), 1 + (kernel - 1) * rest):
            break
        if all(math.gcd(r, other) == 1 for other in above):
            yield from _rising(depth - 1, rest, kernel, distance, (r, *above))
