"""Anchors: boxes of given shapes around every place of a map, and which of them lie on a picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def grid_anchors(shapes: Tensor, stride: Sequence[float], size: Sequence[int]) -> Tensor:
    """Boxes (y x a, 4) of the `shapes` (a, 2), width and height, around each of y x x places, all shapes of one first.

    Place (i, j) is centred at ((j + 1/2) s_x, (i + 1/2) s_y), where its pixels are, strides (s_y, s_x).

    >>> grid_anchors(torch.tensor([[8.0, 4.0]]), (16, 16), (1, 2))
    tensor([[ 4.,  6., 12., 10.],
            [20.,  6., 28., 10.]])
    """
    y, x = (
        (torch.arange(count, device=shapes.device, dtype=shapes.dtype) + 0.5) * step
        for count, step in zip(size, stride, strict=True)
    )
    centres = torch.stack((x.expand(size[0], -1), y.unsqueeze(1).expand(-1, size[1])), -1).view(-1, 1, 2)
    half = shapes / 2
    return torch.cat((centres - half, centres + half), -1).view(-1, 4)


def centred_within(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Which boxes (n, 4) have their centre on each picture: (b, n) bool, for valid sizes (b, 2), y and x."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return (centres < sizes.flip(1).unsqueeze(1)).all(-1)


def mean_within(features: Tensor, sizes: Tensor, image: Sequence[int]) -> Tensor:
    """The mean (b, c, 1, 1) of features (b, c, y, x) over those places that lie on each picture.

    sizes (b, 2) are the pictures' in a batch of `image` (height, width) pixels; where they fill it, the plain mean.
    """
    inside = []
    for axis, pixels in enumerate(image):
        places = features.shape[2 + axis]
        starts = torch.arange(places, device=features.device) * (pixels / places)
        inside.append(starts < sizes[:, axis, None])
    mask = (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1).to(features.dtype)
    return (features * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp(min=1)
