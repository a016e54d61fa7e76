"""Position-sensitive RoI pooling: Dai et al. 2016, "R-FCN: Object Detection via Region-based Fully Convolutional
Networks", section 2, equation 1. Bin (i, j) of a region is the mean over whole pixels of score map (i, j) alone.

    out[d, i, j] = Σ over the pixels (y, x) of bin (i, j) of  F[(d k + i) k + j, y, x] / n

| convention    | region                    | a bin of it                        |
|---------------|---------------------------|------------------------------------|
| "torchvision" | [x1 s] to [x2 s]          | from ⌊start⌋ to ⌈end⌉, within the map |
| "rfcn"        | [x1] s to ([x2] + 1) s    | the same                           |

[·] rounds half away from zero, as C does. Bins reach to the map's last row and column; torchvision's forward pass
leaves those out (its backward pass does not), so results differ where a region touches the right or lower border.

Shapes: input (b, d k_y k_x, y, x), boxes (r, 5) as image x1 y1 x2 y2 or a list of (k, 4), result (r, d, k_y, k_x).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from volvelle.export import export
from volvelle.parts.convolution.atrous import Size
from volvelle.parts.regions.ps_roi_align import check_own, own_means
from volvelle.parts.regions.rois import as_rois, bins_of, half_away, whole_bins


@export("functional.ps_roi_pool", stable=True)
def ps_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: Size,
    spatial_scale: float = 1.0,
    *,
    convention: Literal["torchvision", "rfcn"] = "torchvision",
) -> Tensor:
    """Return, for each bin of each box, the mean of that bin's own map over it: (r, d, k_y, k_x), zero outside.

    input (b, d k_y k_x, y, x), the bins of one output channel lying together; boxes (r, 5) as image x1 y1 x2 y2, or for
    each image a tensor (k, 4), in pixels that `spatial_scale` takes to those of the input. `convention` says where
    corners are rounded (see the head of this file). Gradients, first and second, for the input. Sixteen-bit inputs are
    summed in fp32. Raises ValueError for shapes and options that do not fit. Dai et al. 2016, equation 1.

    >>> maps = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 6, 6)  # map n is n everywhere
    >>> ps_roi_pool(maps, torch.tensor([[0.0, 1, 1, 5, 5]]), 2)
    tensor([[[[0., 1.],
              [2., 3.]]]])
    """
    call = "ps_roi_pool"
    image, corners = as_rois(call, input, boxes)
    k_y, k_x = bins_of(call, output_size)
    if convention not in ("torchvision", "rfcn"):
        raise ValueError(f'{call}: convention must be "torchvision" or "rfcn", got {convention!r}')
    check_own(call, input, k_y * k_x, 1, "mean", convention)
    corners = corners.detach()
    if convention == "torchvision":
        placed, least = half_away(corners * spatial_scale), 1.0
    else:
        placed, least = half_away(corners), 0.1
        placed = torch.cat((placed[:, :2], placed[:, 2:] + 1), dim=1) * spatial_scale
    x1, y1, x2, y2 = placed.unbind(1)
    rows = _weights(y1, (y2 - y1).clamp(min=least) / k_y, k_y, input.shape[2])
    columns = _weights(x1, (x2 - x1).clamp(min=least) / k_x, k_x, input.shape[3])
    return own_means(input, image, rows, columns)


def _weights(start: Tensor, size: Tensor, bins: int, n: int) -> Tensor:
    """The mean over the whole pixels of each bin as weights (r, bins, n)."""
    p = torch.arange(bins, device=start.device, dtype=start.dtype)
    first, last = p * size[:, None] + start[:, None], (p + 1) * size[:, None] + start[:, None]
    low, high = whole_bins(first.floor(), last.ceil(), n)
    pixel = torch.arange(n, device=start.device)
    inside = (pixel >= low[..., None]) & (pixel < high[..., None])
    weights = inside.to(start.dtype) / (high - low).clamp(min=1)[..., None]
    return torch.where((first + last).isnan()[..., None] & (pixel == 0), torch.nan, weights)
