"""Facts of masks: the boxes around them, and how much a mask changes when the threshold that makes it moves.

    stability(z) = |z > t + δ| / |z > t - δ|            Kirillov et al. 2023, "Segment Anything", appendix B

where z are a mask's logits, t the threshold and δ the offset: the IoU of two masks of which one holds the other.

Shapes: masks and logits (..., y, x).
"""

from __future__ import annotations

import torch
from torch import Tensor

from volvelle.export import export


@export("functional.masks_to_boxes")
def masks_to_boxes(masks: Tensor) -> Tensor:
    """Return the box of each mask, from its first pixel to its last: x1 y1 x2 y2, so one pixel has a box without area.

    masks (n, y, x), bool or numbers that are 0 or not; the result (n, 4), fp32. A mask without pixels has zeros
    (torchvision's function of this name raises). Raises ValueError for other shapes.

    >>> masks = torch.zeros(2, 5, 6, dtype=torch.bool)
    >>> masks[0, 1:3, 2:6] = True
    >>> masks_to_boxes(masks)
    tensor([[2., 1., 5., 2.],
            [0., 0., 0., 0.]])
    """
    if masks.dim() != 3:
        raise ValueError(f"masks_to_boxes: masks must be (n, y, x), got shape {tuple(masks.shape)}")
    if 0 in masks.shape:
        return torch.zeros(len(masks), 4, device=masks.device)
    known = masks != 0
    (left, right), (top, bottom) = _ends(known.any(1)), _ends(known.any(2))
    boxes = torch.stack((left, top, right, bottom), dim=1).float()
    return torch.where(known.flatten(1).any(1)[:, None], boxes, 0.0)


@export("functional.stability_score")
def stability_score(logits: Tensor, threshold: float = 0.0, offset: float = 1.0) -> Tensor:
    """Return how stable masks are: |logits > threshold + offset| / |logits > threshold - offset|, in [0, 1].

    logits (..., y, x); the result (...), fp32. A mask that is empty at the lower threshold gives NaN, which is above no
    threshold; NaN logits count as outside. No gradient. Raises ValueError where the offset is below 0 or there is no
    plane. Kirillov et al. 2023, appendix B.

    >>> stability_score(torch.tensor([[[3.0, 0.5], [0.5, -3.0]]]))
    tensor([0.3333])
    """
    if logits.dim() < 2 or not offset >= 0:
        raise ValueError(
            f"stability_score: wants logits (..., y, x) and an offset of 0 or more, got shape {tuple(logits.shape)} "
            f"and {offset}"
        )
    return _count(logits > threshold + offset) / _count(logits > threshold - offset)


def _count(masks: Tensor) -> Tensor:
    return torch.count_nonzero(masks, dim=(-2, -1))


def _ends(touched: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last place (n) that is True in each row (n, m)."""
    places, count = torch.arange(touched.shape[1], device=touched.device), touched.shape[1]
    return torch.where(touched, places, count).amin(1), torch.where(touched, places, -1).amax(1)
