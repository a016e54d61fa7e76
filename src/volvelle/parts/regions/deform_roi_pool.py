"""Deformable RoI pooling: Dai et al. 2017, "Deformable Convolutional Networks", section 2.2, equations 5 and 8.

    out[c, p, q] = mean over the samples of bin (p, q), all moved by Δ_pq,     Δ_pq = γ (w Δ̂x_pq, h Δ̂y_pq)

Each bin of a region moves by an offset of its own, given as a share of the region's width and height times γ. The
position-sensitive form reads map (p, q) alone in bin (p, q) (`ps_roi_align`).

Shapes: input (b, c, y, x), boxes (r, 5) as image x1 y1 x2 y2 or a list of (k, 4), offset (r, 2, k_y, k_x) with Δ̂x
first, result (r, c, k_y, k_x) or (r, c / (k_y k_x), k_y, k_x).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from volvelle.export import export
from volvelle.parts.convolution.atrous import Size
from volvelle.parts.regions.boxes import wide
from volvelle.parts.regions.ps_roi_align import Convention, check_own, own_places, own_samples, placed
from volvelle.parts.regions.rois import as_rois, bins_of
from volvelle.parts.regions.samples import Reduce, grid, pooled
from volvelle.parts.regions.taps import clamped_taps, pixel_table


@export("functional.deform_roi_pool", stable=True)
def deform_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor,
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    gamma: float = 0.1,
) -> Tensor:
    """Return the mean of bilinear samples in bins that move: (r, c, k_y, k_x); at rest `roi_align(aligned=True)`.

    input (b, c, y, x); boxes (r, 5) as image x1 y1 x2 y2, or for each image a tensor (k, 4), in pixels that
    `spatial_scale` takes to those of the input; offset (r, 2, k_y, k_x), Δ̂x before Δ̂y; sampling_ratio² samples a bin.
    Gradients for input, boxes and offset, first and second. Raises ValueError for shapes that do not fit. Dai et al.
    2017, equation 5.

    >>> import torch
    >>> image, box = torch.arange(36.0).view(1, 1, 6, 6), torch.tensor([[0.0, 0, 0, 4, 4]])
    >>> right = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    >>> deform_roi_pool(image, box, right * 0, 1), deform_roi_pool(image, box, right, 1, gamma=0.25)  # by one pixel
    (tensor([[[[10.5000]]]]), tensor([[[[11.5000]]]]))
    """
    call = "deform_roi_pool"
    image, corners = as_rois(call, input, boxes)
    k_y, k_x = bins_of(call, output_size)
    check_moves(call, offset, (corners.shape[0], 2, k_y, k_x), sampling_ratio)
    (x1, y1), (w, h) = placed(corners, spatial_scale, "torchvision")
    moves = gamma * wide(offset)[..., None]  # (r, 2, k_y, k_x, 1)
    y = grid(y1, h / k_y, k_y, sampling_ratio)[:, :, None] + moves[:, 1] * h.view(-1, 1, 1, 1)
    x = grid(x1, w / k_x, k_x, sampling_ratio)[:, None] + moves[:, 0] * w.view(-1, 1, 1, 1)
    height, width = input.shape[2:]
    first = (image * (height * width))[:, None, None]
    found = pooled(pixel_table(input[:, None]), first, clamped_taps(y, height), clamped_taps(x, width), width, "mean")
    return found.permute(0, 3, 1, 2).to(input.dtype)


@export("functional.deform_ps_roi_pool", stable=True)
def deform_ps_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor,
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    gamma: float = 0.1,
    *,
    reduce: Reduce = "mean",
    convention: Convention = "rfcn",
) -> Tensor:
    """Return the mean or maximum of each bin's own map at samples that move: `ps_roi_align` with its bins moved.

    input (b, d k_y k_x, y, x); boxes and offset as in `deform_roi_pool`; the result is (r, d, k_y, k_x). `reduce` and
    `convention` as in `ps_roi_align`; "rfcn" is what the paper's authors released. Gradients for input, boxes (but for
    the rounded ones of "rfcn") and offset, first and second. Raises ValueError for shapes and options that do not fit.
    Dai et al. 2017, equation 8.

    >>> import torch
    >>> maps = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 6, 6)  # map n is n everywhere
    >>> deform_ps_roi_pool(maps, torch.tensor([[0.0, 1, 1, 4, 4]]), torch.zeros(1, 2, 2, 2), 2)
    tensor([[[[0., 1.],
              [2., 3.]]]])
    """
    call = "deform_ps_roi_pool"
    image, corners = as_rois(call, input, boxes)
    k_y, k_x = bins_of(call, output_size)
    check_own(call, input, k_y * k_x, sampling_ratio, reduce, convention)
    check_moves(call, offset, (corners.shape[0], 2, k_y, k_x), sampling_ratio)
    start, size = placed(corners, spatial_scale, convention)
    y, x = own_places(start, size, (k_y, k_x), sampling_ratio, convention)
    moves = gamma * wide(offset)[..., None]
    y, x = y + moves[:, 1] * size[1].view(-1, 1, 1, 1), x + moves[:, 0] * size[0].view(-1, 1, 1, 1)
    return own_samples(input, image, y, x, (k_y, k_x), reduce, convention)


def check_moves(call: str, offset: Tensor, shape: tuple[int, ...], sampling_ratio: int) -> None:
    """Raise ValueError unless there is an offset for each bin of each region."""
    if tuple(offset.shape) != shape:
        raise ValueError(f"{call}: offset must be (r, 2, k_y, k_x) = {shape}, got shape {tuple(offset.shape)}")
    if sampling_ratio < 1:
        raise ValueError(f"{call}: sampling_ratio must be at least 1, got {sampling_ratio}")
