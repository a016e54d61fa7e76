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
from volvelle.parts.regions.rois import as_rois, bins_of, half_away
from volvelle.parts.regions.samples import Reduce, grid, pooled
from volvelle.parts.regions.taps import clamped_taps, half_pixel_taps, pixel_table, read

Convention = Literal["torchvision", "rfcn", "thundernet"]
CONVENTIONS: tuple[Convention, ...] = ("torchvision", "rfcn", "thundernet")


@export("functional.ps_roi_align", stable=True)
def ps_roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    *,
    reduce: Reduce = "mean",
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
    check_own(call, input, k_y * k_x, sampling_ratio, reduce, convention)
    start, size = placed(corners, spatial_scale, convention)
    if sampling_ratio <= 0:
        rows = mean_weights(start[1], size[1] / k_y, k_y, input.shape[2])
        columns = mean_weights(start[0], size[0] / k_x, k_x, input.shape[3])
        return own_means(input, image, rows, columns)
    y, x = own_places(start, size, (k_y, k_x), sampling_ratio, convention)
    return own_samples(input, image, y, x, (k_y, k_x), reduce, convention)


def own_places(
    start: Tensor, size: Tensor, bins: tuple[int, int], samples: int, convention: Convention
) -> tuple[Tensor, Tensor]:
    """Where the samples of each bin lie: y (r, k_y, 1, s) and x (r, 1, k_x, s), for starts and sizes as of `placed`."""
    found = []
    for low, whole, k in zip(start.flip(0), size.flip(0), bins, strict=True):
        places = grid(low, whole / k, k, samples)
        found.append(places - (whole / (2 * k * samples))[:, None, None] if convention == "rfcn" else places)
    return found[0][:, :, None], found[1][:, None]


def own_samples(
    input: Tensor, image: Tensor, y: Tensor, x: Tensor, bins: tuple[int, int], reduce: Reduce, convention: Convention
) -> Tensor:
    """The mean or maximum of each bin's own map at positions y and x, (r, k_y, k_x, s) that broadcast."""
    taps = half_pixel_taps if convention == "rfcn" else clamped_taps
    height, width = input.shape[2:]
    table, first = own_maps(input, image, bins)
    found = pooled(table, first, taps(y, height), taps(x, width), width, reduce, convention == "rfcn")
    return found.permute(0, 3, 1, 2).to(input.dtype)


def own_maps(input: Tensor, image: Tensor, bins: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The table of maps (b, d k_y k_x, y, x), and in which row the map of each bin begins, (r, k_y, k_x)."""
    count = bins[0] * bins[1]
    own = torch.arange(count, device=input.device).view(bins)
    first = (image[:, None, None] * count + own) * (input.shape[2] * input.shape[3])
    return pixel_table(input.unflatten(1, (-1, count)).transpose(1, 2)), first


def own_means(input: Tensor, image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Each bin's own map under weights of its rows (r, k_y, y) and columns (r, k_x, x): (r, d, k_y, k_x)."""
    if torch.compiler.is_compiling():
        return _of_all(input, image, rows, columns)
    table, first = own_maps(input, image, (rows.shape[1], columns.shape[1]))
    found = [read(table, first[part], y, x, input.shape[3]) for part, y, x in windows(rows, columns)]
    return torch.cat(found).permute(0, 3, 1, 2).to(input.dtype)


def check_own(call: str, input: Tensor, bins: int, sampling_ratio: int, reduce: str, convention: str) -> None:
    """Raise ValueError for maps and options that do not fit."""
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


def _of_all(input: Tensor, image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows (r, k_y, y) times each bin's map times columns (r, k_x, x): no size depends on a value."""
    (b, c, y, x), (r, k_y, _), k_x = input.shape, rows.shape, columns.shape[1]
    maps = wide(input).unflatten(1, (-1, k_y, k_x)).permute(2, 0, 4, 1, 3, 5).reshape(k_y, b * y, -1)
    found = of_image(rows, image, b).to(maps.dtype).transpose(0, 1) @ maps
    found = found.view(k_y, r, c // (k_y * k_x), k_x, x) * columns.to(maps.dtype)[:, None]
    return found.sum(-1).permute(1, 2, 0, 3).to(input.dtype)


@export("nn.PSRoIAlign", twin=ps_roi_align, stable=True)
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
        reduce: Reduce = "mean",
        convention: Convention = "torchvision",
    ):
        super().__init__()
        self.output_size, self.spatial_scale, self.sampling_ratio = output_size, spatial_scale, sampling_ratio
        self.reduce: Reduce = reduce
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
