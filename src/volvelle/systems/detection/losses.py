"""The losses of boxes and scores, with gradients of zero (not none) where there is nothing to learn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from volvelle.parts.regions.boxes import encode_boxes


def box_losses(
    deltas: Tensor, boxes: Tensor, objects: Tensor, positive: Tensor, *, weights: Sequence[float], beta: float
) -> Tensor:
    """Smooth L1 (b, n) between what was said and what leads from boxes to their objects; 0 where not positive.

    deltas, boxes, objects (b, n, 4). Below `beta` the loss is quadratic (Girshick 2015, "Fast R-CNN", equation 3).
    """
    here = positive.unsqueeze(-1)
    # Rows that do not count get boxes that can be encoded: 0 times a NaN would still be one.
    unit = boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
    wanted = encode_boxes(torch.where(here, objects, unit), torch.where(here, boxes, unit), tuple(weights))
    wanted = torch.where(here, wanted, deltas.detach())
    return F.smooth_l1_loss(deltas, wanted, reduction="none", beta=beta).sum(-1)


def objectness_losses(logits: Tensor, positive: Tensor) -> Tensor:
    """Binary cross-entropy (b, n) of each anchor."""
    return F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")


def mean_over(losses: Tensor, mask: Tensor) -> Tensor:
    """The mean of losses (b, n) over the mask, and 0 with zero gradients where the mask is empty.

    >>> mean_over(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor(2.)
    """
    return sum_over(losses, mask) / mask.sum().clamp(min=1)


def sum_over(losses: Tensor, mask: Tensor) -> Tensor:
    """The sum of losses (b, n) over the mask."""
    return losses.masked_fill(~mask, 0.0).sum()
