"""What the poolings of regions share: RoIs from boxes, and where their bins and samples lie.

A RoI is (image, x1, y1, x2, y2); r of them are (r, 5), k output bins an axis are cut from each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from volvelle.parts.convolution.atrous import Size, per_axis
from volvelle.parts.regions.boxes import wide


def as_rois(call: str, input: Tensor, boxes: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The image of each RoI, int64 (r), and its corners (r, 4) in the dtype in which positions are computed.

    `boxes` is (r, 5), or for each image a tensor (k, 4).
    """
    if input.dim() != 4 or not input.is_floating_point():
        raise ValueError(f"{call}: input must be floating point (b, c, y, x), got {input.dtype} {tuple(input.shape)}")
    if 0 in input.shape[2:]:
        raise ValueError(f"{call}: input must have pixels, got shape {tuple(input.shape)}")
    if isinstance(boxes, Tensor):
        if boxes.dim() != 2 or boxes.shape[1] != 5:
            raise ValueError(
                f"{call}: boxes must be (r, 5), image x1 y1 x2 y2, or a list of (k, 4), got shape {tuple(boxes.shape)}"
            )
        image, corners = boxes[:, 0].detach(), boxes[:, 1:]
    else:
        if len(boxes) != input.shape[0] or any(b.dim() != 2 or b.shape[1] != 4 for b in boxes):
            shapes = [tuple(b.shape) for b in boxes]
            raise ValueError(
                f"{call}: a list of boxes must hold (k, 4) for each of {input.shape[0]} images, got {shapes}"
            )
        counts = [torch.full_like(b[:, 0].detach(), i) for i, b in enumerate(boxes)]
        image, corners = torch.cat(counts), torch.cat(list(boxes))
    precise = torch.promote_types(wide(input).dtype, wide(corners).dtype)
    return _images(call, image, input.shape[0]), corners.to(precise)


def _images(call: str, image: Tensor, b: int) -> Tensor:
    """Numbers of images as int64. Only where they can be read without a stop are they checked."""
    number = image.nan_to_num(-1.0).long() if image.is_floating_point() else image.long()
    if torch.compiler.is_compiling() or number.device.type != "cpu" or not number.numel():
        return number.clamp(0, b - 1)
    if bool(((number < 0) | (number >= b)).any()):
        raise ValueError(f"{call}: the images of the boxes must lie in 0 to {b - 1}, got {sorted(set(image.tolist()))}")
    return number


def bins_of(call: str, output_size: Size) -> tuple[int, int]:
    """Bins in y and x."""
    sizes = per_axis(output_size, 2)
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"{call}: output_size must be at least 1, once or for both axes, got {output_size}")
    return sizes[0], sizes[1]


def whole_bins(start: Tensor, end: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Where bins from `start` to `end` begin and stop on an axis of n, in whole pixels, int64."""
    low, high = (edge.nan_to_num(0.0).clamp(0, n).long() for edge in (start, end))
    return low, high


def half_away(x: Tensor) -> Tensor:
    """Round halves away from zero, as C's round does; torch.round takes them to the even neighbour.

    >>> half_away(torch.tensor([0.5, 1.5, 2.5, -0.5, 0.49999997]))
    tensor([ 1.,  2.,  3., -1.,  0.])
    """
    whole = x.trunc()
    return whole + torch.where((x - whole).abs() >= 0.5, x.sign(), 0.0)
