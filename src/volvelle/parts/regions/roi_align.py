"""RoIAlign: He et al. 2017, "Mask R-CNN", section 3. Each bin of a region is the mean of bilinear samples, with no
coordinate rounded.

    out[c, p, q] = mean over the samples (y, x) of bin (p, q) of  Σ_ij max(0, 1 - |y - i|) max(0, 1 - |x - j|) F[c, i,
    j]

Shapes: input (b, c, y, x), boxes (r, 5) as image x1 y1 x2 y2 or a list of (k, 4), result (r, c, k_y, k_x).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.convolution.atrous import Size
from volvelle.parts.regions.averages import mean_weights, windows
from volvelle.parts.regions.boxes import wide
from volvelle.parts.regions.rois import as_rois, bins_of
from volvelle.parts.regions.samples import grid, pooled
from volvelle.parts.regions.taps import clamped_taps, pixel_table, read


@export("functional.roi_align", stable=True)
def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Return the mean of bilinear samples in each bin of each box: (r, c, k_y, k_x).

    input (b, c, y, x); boxes (r, 5) as image x1 y1 x2 y2, or for each image a tensor (k, 4), in pixels that
    `spatial_scale` takes to those of the input. A bin has sampling_ratio² samples, or as many as it is long (rounded
    up) for sampling_ratio <= 0. `aligned` moves boxes by half a pixel, so that pixel i covers [i, i + 1]; without it
    boxes are taken to be at least one pixel long. Samples more than a pixel outside are zero, nearer ones read the
    border.

    Gradients for input and boxes, first and second. Sixteen-bit inputs are summed in fp32. Under torch.compile and
    torch.export give a sampling_ratio: without one all pairs of region and row are multiplied, and a NaN in the input
    reaches every region. Raises ValueError for shapes that do not fit. He et al. 2017, section 3.

    >>> image = torch.arange(16.0).view(1, 1, 4, 4)
    >>> roi_align(image, torch.tensor([[0.0, 0, 0, 4, 4]]), 2, sampling_ratio=2, aligned=True)[0, 0]
    tensor([[ 2.5000,  4.5000],
            [10.5000, 12.5000]])
    """
    image, corners = as_rois("roi_align", input, boxes)
    k_y, k_x = bins_of("roi_align", output_size)
    corners = corners * spatial_scale - (0.5 if aligned else 0.0)
    size = corners[:, 2:] - corners[:, :2]
    if not aligned:
        size = size.clamp(min=1)
    (x1, y1), (w, h) = corners[:, :2].unbind(1), size.unbind(1)
    height, width = input.shape[2:]
    first = (image * (height * width))[:, None, None]
    if sampling_ratio > 0:
        y = clamped_taps(grid(y1, h / k_y, k_y, sampling_ratio)[:, :, None], height)
        x = clamped_taps(grid(x1, w / k_x, k_x, sampling_ratio)[:, None], width)
        found = pooled(pixel_table(input[:, None]), first, y, x, width, "mean")
        return found.permute(0, 3, 1, 2).to(input.dtype)
    rows, columns = mean_weights(y1, h / k_y, k_y, height), mean_weights(x1, w / k_x, k_x, width)
    if torch.compiler.is_compiling():
        return _of_all(input, image, rows, columns)
    table = pixel_table(input[:, None])
    found = [read(table, first[part], y, x, width) for part, y, x in windows(rows, columns)]
    return torch.cat(found).permute(0, 3, 1, 2).to(input.dtype)


def _of_all(input: Tensor, image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows (r, k, y) times maps times columns (r, k, x): no size depends on a value."""
    (b, c, y, x), (r, k_y, _) = input.shape, rows.shape
    maps = wide(input).permute(0, 2, 1, 3).reshape(b * y, c * x)
    found = of_image(rows, image, b).to(maps.dtype).flatten(0, 1) @ maps
    found = found.view(r, k_y, c, x).transpose(1, 2).flatten(1, 2)
    return (found @ columns.to(maps.dtype).mT).unflatten(1, (c, k_y)).to(input.dtype)


def of_image(rows: Tensor, image: Tensor, b: int) -> Tensor:
    """Weights (r, k, y) of a map's rows as weights (r, k, b y) of the rows of all maps."""
    own = F.one_hot(image, b).to(rows.dtype)
    return (rows[:, :, None] * own[:, None, :, None]).flatten(2)


@export("nn.RoIAlign", twin=roi_align)
class RoIAlign(nn.Module):
    """`roi_align` with its options: called with a map and boxes.

    >>> RoIAlign(7, 1 / 16, 2)(torch.zeros(1, 8, 20, 30), torch.tensor([[0.0, 8, 8, 99, 80]])).shape
    torch.Size([1, 8, 7, 7])
    """

    def __init__(self, output_size: Size, spatial_scale: float = 1.0, sampling_ratio: int = -1, aligned: bool = False):
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale
        self.sampling_ratio, self.aligned = sampling_ratio, aligned

    def forward(self, input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """Return (r, c, k_y, k_x) for a map (b, c, y, x) and boxes (r, 5)."""
        return roi_align(input, boxes, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)
