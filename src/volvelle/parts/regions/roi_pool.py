"""RoI pooling: Girshick 2015, "Fast R-CNN", section 2.1. The maximum over whole pixels of each bin of a region.

    out[c, p, q] = max over i in [⌊p h / k⌋, ⌈(p + 1) h / k⌉), j likewise, of  F[c, y + i, x + j]

The region's corners are rounded to whole pixels (halves away from zero). Any maximum over a rectangle is that over four
overlapping squares of powers of two, at its corners; those are max-poolings of the whole map, made once for all
regions.

Shapes: input (b, c, y, x), boxes (r, 5) as image x1 y1 x2 y2 or a list of (k, 4), result (r, c, k_y, k_x).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from volvelle.export import export
from volvelle.parts.convolution.atrous import Size
from volvelle.parts.regions.rois import as_rois, bins_of, half_away, whole_bins


@export("functional.roi_pool", stable=True)
def roi_pool(input: Tensor, boxes: Tensor | Sequence[Tensor], output_size: Size, spatial_scale: float = 1.0) -> Tensor:
    """Return the largest pixel in each bin of each box: (r, c, k_y, k_x), zero where a bin lies outside.

    input (b, c, y, x); boxes (r, 5) as image x1 y1 x2 y2, or for each image a tensor (k, 4), in pixels that
    `spatial_scale` takes to those of the input, both corners belonging to the box. Gradients, first and second, for the
    input; pixels that share a maximum share its gradient. A NaN makes the bins that hold it NaN, a NaN box its own
    bins. Raises ValueError for shapes that do not fit. Girshick 2015, section 2.1.

    >>> image = torch.arange(16.0).view(1, 1, 4, 4)
    >>> roi_pool(image, torch.tensor([[0.0, 0, 0, 3, 3]]), 2)[0, 0]
    tensor([[ 5.,  7.],
            [13., 15.]])
    """
    image, corners = as_rois("roi_pool", input, boxes)
    k_y, k_x = bins_of("roi_pool", output_size)
    corners = corners.detach()
    x1, y1, x2, y2 = half_away(corners * spatial_scale).unbind(1)
    (b, _, height, width) = input.shape
    low_y, high_y = _bins(y1, y2, k_y, height)
    low_x, high_x = _bins(x1, x2, k_x, width)
    level_y, level_x = _level(high_y - low_y, height), _level(high_x - low_x, width)
    most_y, most_x = _most(level_y, height), _most(level_x, width)
    table = _powers(input, most_y, most_x)
    level = level_y[:, :, None] * most_x + level_x[:, None]
    first = (level * b + image[:, None, None]) * (height * width)
    rows = torch.stack((low_y, (high_y - (1 << level_y)).clamp(min=0)), dim=-1)[:, :, None, :, None]
    columns = torch.stack((low_x, (high_x - (1 << level_x)).clamp(min=0)), dim=-1)[:, None, :, None, :]
    empty = ((high_y <= low_y)[:, :, None] | (high_x <= low_x)[:, None])[..., None, None]
    at = torch.where(empty, table.shape[0] - 1, first[..., None, None] + rows * width + columns)
    found = F.embedding(at.flatten(3), table).amax(3).permute(0, 3, 1, 2)
    return torch.where(corners.isnan().any(1)[:, None, None, None], torch.nan, found)


def _bins(start: Tensor, end: Tensor, bins: int, n: int) -> tuple[Tensor, Tensor]:
    size = ((end - start + 1).clamp(min=1) / bins)[:, None]
    p = torch.arange(bins, device=start.device, dtype=start.dtype)
    return whole_bins((p * size).floor() + start[:, None], ((p + 1) * size).ceil() + start[:, None], n)


def _level(length: Tensor, n: int) -> Tensor:
    """⌊log₂ length⌋ of lengths up to n, 0 for 0."""
    powers = 2 ** torch.arange(1, n.bit_length(), device=length.device)
    return (length[..., None] >= powers).sum(-1)


def _most(level: Tensor, n: int) -> int:
    """How many levels are needed; all that fit where the values cannot be looked at."""
    if torch.compiler.is_compiling():
        return n.bit_length()
    return int(level.max()) + 1 if level.numel() else 1


def _powers(input: Tensor, most_y: int, most_x: int) -> Tensor:
    """Pixels of the maxima over 2^i x 2^j pixels from each on, (levels b y x + 1, c); the last row is zero."""
    _, c, height, width = input.shape
    found = []
    for i in range(most_y):
        for j in range(most_x):
            largest = F.max_pool2d(input, (1 << i, 1 << j), stride=1)
            largest = F.pad(largest, (0, width - largest.shape[3], 0, height - largest.shape[2]))
            found.append(largest.permute(0, 2, 3, 1).reshape(-1, c))
    return F.pad(torch.cat(found), (0, 0, 0, 1))
