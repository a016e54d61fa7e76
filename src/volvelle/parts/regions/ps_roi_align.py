"""Position-sensitive RoIAlign: bin (i, j) of a region reads score map (i, j) alone, at bilinear samples.

    out[d, i, j] = mean or max over the samples (y, x) of bin (i, j) of  F[(d k + i) k + j](y, x)

The idea of R-FCN (Dai et al. 2016, "R-FCN: Object Detection via Region-based Fully Convolutional Networks", section 2)
with RoIAlign's samples, as in Light-Head R-CNN (Li et al. 2017) and ThunderNet (Qin et al. 2019, section 3.3). Released
implementations place the samples differently; their conventions are named:

| convention    | region                              | samples of a bin     | outside the map              |
|---------------|-------------------------------------|----------------------|------------------------------|
| "torchvision" | x1 s - 1/2 to x2 s - 1/2            | in the middle of s²  | zero from a pixel outside on |
| "rfcn"        | [x1] s - 1/2 to ([x2] + 1) s - 1/2  | at the corners of s² | left out from half a pixel on|
| "thundernet"  | x1 s to x2 s, at least a pixel      | in the middle of s²  | zero from a pixel outside on |

[·] rounds half away from zero, as C does. "rfcn" is the pooling of Deformable ConvNets' R-FCN (Dai et al. 2017) with
its bins at rest; ThunderNet's authors released theirs with reduce="max".

Shapes: input (b, d k_y k_x, y, x), boxes (r, 5) as image x1 y1 x2 y2 or a list of (k, 4), result (r, d, k_y, k_x).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.convolution.atrous import Size
from volvelle.parts.regions.averages import mean_weights, windows
from volvelle.parts.regions.boxes import wide
from volvelle.parts.regions.roi_align import of_image
from volvelle.parts.regions.rois import as_rois, bins_of, grid, half_away
from volvelle.parts.regions.taps import Taps, clamped_taps, half_pixel_taps, mean_of, pixel_table, read

Convention = Literal["torchvision", "rfcn", "thundernet"]
CONVENTIONS: tuple[Convention, ...] = ("torchvision", "rfcn", "thundernet")


@export("functional.ps_roi_align")
def ps_roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    *,
    reduce: Literal["mean", "max"] = "mean",
    convention: Convention = "torchvision",
) -> Tensor:
    """Return, for each bin of each box, the mean or maximum of samples of that bin's own map: (r, d, k_y, k_x).

    input (b, d k_y k_x, y, x), the bins of one output channel lying together; boxes (r, 5) as image x1 y1 x2 y2, or for
    each image a tensor (k, 4), in pixels that `spatial_scale` takes to those of the input. A bin has sampling_ratio²
    samples; for sampling_ratio <= 0 as many as it is long, rounded up, which only the mean of "torchvision" has.
    `convention` says where they lie (see the table at the head of this file).

    Gradients for input and boxes, first and second. Sixteen-bit inputs are summed in fp32. Raises ValueError for shapes
    and options that do not fit. Dai et al. 2016, section 2; Qin et al. 2019, section 3.3.

    >>> maps = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 6, 6)  # map n is n everywhere
    >>> ps_roi_align(maps, torch.tensor([[0.0, 1, 1, 5, 5]]), 2, sampling_ratio=2)
    tensor([[[[0., 1.],
              [2., 3.]]]])
    """
    call = "ps_roi_align"
    image, corners = as_rois(call, input, boxes)
    k_y, k_x = bins_of(call, output_size)
    _check(call, input, k_y * k_x, sampling_ratio, reduce, convention)
    (x1, y1), (w, h) = placed(corners, spatial_scale, convention)
    height, width = input.shape[2:]
    if sampling_ratio <= 0:
        rows, columns = mean_weights(y1, h / k_y, k_y, height), mean_weights(x1, w / k_x, k_x, width)
        if torch.compiler.is_compiling():
            return _of_all(input, image, rows, columns)
    table = pixel_table(input.unflatten(1, (-1, k_y * k_x)).transpose(1, 2))
    own = torch.arange(k_y * k_x, device=input.device).view(k_y, k_x)  # each bin's map
    first = (image[:, None, None] * (k_y * k_x) + own) * (height * width)
    if sampling_ratio <= 0:
        found = torch.cat([read(table, first[part], y, x, width) for part, y, x in windows(rows, columns)])
    else:
        y = _samples(y1, h / k_y, k_y, height, sampling_ratio, convention)
        x = _samples(x1, w / k_x, k_x, width, sampling_ratio, convention)
        counted = convention == "rfcn"
        if reduce == "mean":
            found = read(table, first, mean_of(y, inside=counted), mean_of(x, inside=counted), width)
        else:
            found = _largest(table, first, y, x, width, counted)
    return found.permute(0, 3, 1, 2).to(input.dtype)


def _check(call: str, input: Tensor, bins: int, sampling_ratio: int, reduce: str, convention: str) -> None:
    if input.shape[1] % bins or not input.shape[1]:
        raise ValueError(f"{call}: input must have a multiple of {bins} channels, got shape {tuple(input.shape)}")
    if reduce not in ("mean", "max"):
        raise ValueError(f'{call}: reduce must be "mean" or "max", got {reduce!r}')
    if convention not in CONVENTIONS:
        raise ValueError(f"{call}: convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    if sampling_ratio <= 0 and (reduce, convention) != ("mean", "torchvision"):
        raise ValueError(f'{call}: {reduce} of "{convention}" takes a sampling_ratio from 1 on, got {sampling_ratio}')


def placed(corners: Tensor, scale: float, convention: Convention) -> tuple[Tensor, Tensor]:
    """Where regions (r, 4) begin on the map and how long they are: (x, y) and (w, h), each (2, r)."""
    if convention == "rfcn":
        corners = half_away(corners)
        corners = torch.cat((corners[:, :2], corners[:, 2:] + 1), dim=1)
    corners = corners * scale - (0.0 if convention == "thundernet" else 0.5)
    start, size = corners[:, :2].T, (corners[:, 2:] - corners[:, :2]).T
    least = {"torchvision": None, "rfcn": 0.1, "thundernet": 1.0}[convention]
    return start, size if least is None else size.clamp(min=least)


def _samples(start: Tensor, size: Tensor, bins: int, n: int, samples: int, convention: Convention) -> Taps:
    """The samples of each bin on an axis of n, as taps (r, bins, samples, 2)."""
    places = grid(start, size, bins, samples)
    if convention == "rfcn":
        return half_pixel_taps(places - (size / (2 * samples))[:, None, None], n)
    return clamped_taps(places, n)


def _largest(table: Tensor, first: Tensor, y: Taps, x: Taps, width: int, counted: bool) -> Tensor:
    """The largest of the samples y (r, k_y, s, 2) and x (r, k_x, s, 2): (r, k_y, k_x, c).

    Samples outside are zero, or with `counted` left out; bins without any sample are zero.
    """
    s = y.at.shape[2]
    each = first.repeat_interleave(s, 1).repeat_interleave(s, 2)
    rows, columns = (Taps(taps.at.flatten(1, 2), taps.weight.flatten(1, 2)) for taps in (y, x))
    found = read(table, each, rows, columns, width)
    found = found.unflatten(2, (-1, s)).unflatten(1, (-1, s))  # (r, k_y, s, k_x, s, c)
    if not counted:
        return found.amax((2, 4))
    inside = (y.at[..., 0] >= 0)[:, :, :, None, None, None] & (x.at[..., 0] >= 0)[:, None, None, :, :, None]
    best = torch.where(inside, found, -torch.inf).amax((2, 4))
    return torch.where(inside.any(4).any(2), best, 0.0)


def _of_all(input: Tensor, image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows (r, k_y, y) times each bin's map times columns (r, k_x, x): no size depends on a value."""
    b, _, y, x = input.shape
    maps = wide(input).transpose(0, 1).reshape(-1, rows.shape[1], columns.shape[1], b * y, x)
    rows = of_image(rows, image, b).to(maps.dtype)
    return torch.einsum("rpn,dpqnx,rqx->rdpq", rows, maps, columns.to(maps.dtype)).to(input.dtype)


@export("nn.PSRoIAlign", twin=ps_roi_align)
class PSRoIAlign(nn.Module):
    """`ps_roi_align` with its options: called with a map and boxes.

    >>> PSRoIAlign(7, 1 / 16, 2)(torch.zeros(1, 245, 20, 20), torch.tensor([[0.0, 8, 8, 99, 80]])).shape
    torch.Size([1, 5, 7, 7])
    """

    def __init__(
        self,
        output_size: Size,
        spatial_scale: float = 1.0,
        sampling_ratio: int = -1,
        *,
        reduce: Literal["mean", "max"] = "mean",
        convention: Convention = "torchvision",
    ):
        super().__init__()
        self.output_size, self.spatial_scale, self.sampling_ratio = output_size, spatial_scale, sampling_ratio
        self.reduce: Literal["mean", "max"] = reduce
        self.convention: Convention = convention

    def forward(self, input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """Return (r, d, k_y, k_x) for a map (b, d k_y k_x, y, x) and boxes (r, 5)."""
        return ps_roi_align(
            input,
            boxes,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            reduce=self.reduce,
            convention=self.convention,
        )
