"""Gridding of stacked atrous convolutions: Yu et al. 2017, "Dilated Residual Networks", section 4; Wang et al. 2018,
"Understanding Convolution for Semantic Segmentation", section 3.2.

Layers with rates r_1, .., r_n and kernels K_i connect an output with the inputs at distances Σ_i r_i (k_i - p_i). How
many paths lead to each is a product of polynomials,

    P(z) = Π_i (1 + z^(r_i) + .. + z^(r_i (K_i - 1)))

and a coefficient 0 is an input within the field that no weight ever sees. The order of the layers does not matter. On
an image both axes do this independently, so an input is reached when its row and its column are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from volvelle.export import export
from volvelle.parts.convolution.atrous import Size, check_sizes, per_axis, same_padding


class Gridding(NamedTuple):
    """Which inputs of its field an output sees along one axis, and in how many ways."""

    paths: tuple[int, ...]
    """For each input of the field the number of paths from it to the output; 0 is a hole."""
    first: int
    """Distance of the first of them from the output, at most 0."""
    grids: int
    """Along an axis, into how many sets inputs and outputs fall that see nothing of each other: the rates' gcd."""

    @property
    def field(self) -> int:
        """Inputs from the first reached to the last, holes included: 1 + Σ r_i (K_i - 1)."""
        return len(self.paths)

    @property
    def holes(self) -> tuple[int, ...]:
        """Distances from the output of those inputs within the field that it does not see."""
        return tuple(place + self.first for place, paths in enumerate(self.paths) if not paths)

    @property
    def coverage(self) -> float:
        """Share of the square field that is seen, 1 without gridding."""
        return (1 - len(self.holes) / self.field) ** 2


@export("functional.gridding")
def gridding(rates: Sequence[int], kernel: Size = 3) -> Gridding:
    """Count the paths from every input to an output of stacked atrous convolutions: the coefficients of P(z).

    `rates` are the dilations of the layers, `kernel` their kernel size or one for each; strides are 1. Exact, for any
    kernels and in any order. Raises ValueError for rates or kernels below 1. Wang et al. 2018, section 3.2.

    >>> gridding((2, 2)).paths, gridding((2, 2)).holes, gridding((2, 2)).grids
    ((1, 0, 2, 0, 3, 0, 2, 0, 1), (-3, -1, 1, 3), 2)
    >>> gridding((1, 2, 3)).field, gridding((1, 2, 3)).holes
    (13, ())
    """
    rates = tuple(rates)
    if not rates:
        raise ValueError("gridding: at least one rate is needed, got none")
    check_sizes("gridding", len(rates), {"rates": rates, "kernel": kernel})
    kernels = per_axis(kernel, len(rates))
    paths = [1]
    for r, taps in zip(rates, kernels, strict=True):
        longer = [0] * (len(paths) + r * (taps - 1))
        for tap in range(taps):
            for place, count in enumerate(paths):
                longer[place + r * tap] += count
        paths = longer
    grids = math.gcd(*(r for r, taps in zip(rates, kernels, strict=True) if taps > 1))
    first = -sum(before for before, _ in same_padding(kernels, rates))
    return Gridding(tuple(paths), first, grids)
