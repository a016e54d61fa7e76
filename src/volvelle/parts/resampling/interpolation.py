"""Nearest and bilinear interpolation, the latter with pixels as areas or with aligned corners.

Output i of n' reads the input of n values at the coordinate

    nearest                       ⌊i n / n'⌋
    bilinear, pixels as areas     (i + 1/2) n / n' - 1/2, held within the image
    bilinear, aligned corners     i (n - 1) / (n' - 1)

with, for bilinear, y = (1 - t) x[j] + t x[j + 1] for the coordinate j + t. Aligned corners keep the first and the last
value in place and change the spacing; areas keep the spacing n / n' and reach over the border by half a pixel.

Shapes: input (b, c, y, x), size (y', x'), result (b, c, y', x').
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from volvelle.export import export


def check_image(call: str, input: Tensor) -> None:
    """Raise ValueError unless this is (b, c, y, x) with at least one pixel."""
    if input.dim() != 4 or input.shape[2] < 1 or input.shape[3] < 1:
        raise ValueError(f"{call}: input must be (b, c, y, x) with at least one pixel, got {tuple(input.shape)}")


def _check(call: str, input: Tensor, size: tuple[int, int]) -> None:
    check_image(call, input)
    if len(size) != 2 or size[0] < 1 or size[1] < 1:
        raise ValueError(f"{call}: size must be two numbers of at least 1, got {size}")


@export("functional.resize_nearest")
def resize_nearest(input: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize by copying the value at ⌊i n / n'⌋, on both axes.

    input (b, c, y, x) of any dtype torch interpolates; size (y', x'), larger or smaller; the result is (b, c, y', x').
    For whole factors each value becomes a block of copies. Raises ValueError for other shapes.

    >>> import torch
    >>> resize_nearest(torch.tensor([[[[1.0, 2.0]]]]), (1, 5)).flatten()
    tensor([1., 1., 1., 2., 2.])
    """
    _check("resize_nearest", input, size)
    return F.interpolate(input, size=size, mode="nearest")


@export("functional.resize_bilinear")
def resize_bilinear(input: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Resize by weighing the two nearest values, on both axes; without a filter where the image shrinks.

    input (b, c, y, x) floating; size (y', x'); the result is (b, c, y', x'). Pixels are areas, or with `align_corners`
    points of which the outermost stay in place. Raises ValueError for other shapes.

    >>> import torch
    >>> line = torch.tensor([[[[0.0, 1.0]]]])
    >>> resize_bilinear(line, (1, 4)).flatten()
    tensor([0.0000, 0.2500, 0.7500, 1.0000])
    >>> resize_bilinear(line, (1, 4), align_corners=True).flatten()
    tensor([0.0000, 0.3333, 0.6667, 1.0000])
    """
    _check("resize_bilinear", input, size)
    return F.interpolate(input, size=size, mode="bilinear", align_corners=align_corners)
