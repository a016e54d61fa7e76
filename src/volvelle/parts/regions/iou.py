"""How far two boxes agree: intersection over union, and extensions that also see how far apart they are.

    IoU  = |A ∩ B| / |A ∪ B|
    GIoU = IoU - |C ∖ (A ∪ B)| / |C|         Rezatofighi et al. 2019, "Generalized Intersection over Union", algorithm 1
    DIoU = IoU - ρ²(a, b) / c²               Zheng et al. 2020, "Distance-IoU Loss", equation 7
    CIoU = DIoU - α v                        the same, equations 8 to 11: v is how far the proportions differ

C is the smallest box around A and B, c its diagonal, ρ the distance of the centres. Every function compares each box of
one set with each of the other; pairs are sets of one: `box_iou(a[:, None], b[:, None])` is (k, 1, 1).

Shapes: boxes1 (..., n, 4), boxes2 (..., m, 4), x1 y1 x2 y2; results (..., n, m), fp32 or fp64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from volvelle.export import export
from volvelle.parts.regions.boxes import SHORTEST, check_boxes, wide


def areas(boxes: Tensor) -> Tensor:
    """Width times height; 0 for a box that is reversed on an axis.

    >>> areas(torch.tensor([[0.0, 0, 2, 3], [2.0, 0, 0, 3]]))
    tensor([6., 0.])
    """
    width, height = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).unbind(-1)
    return width * height


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """The share, and 0 where there is no whole: with a gradient of zero there, not NaN."""
    none = whole == 0
    return torch.where(none, 0.0, part / torch.where(none, 1.0, whole))


def _sets(call: str, boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets against each other: (..., n, 1, 4) and (..., 1, m, 4)."""
    check_boxes(call, boxes1=boxes1, boxes2=boxes2)
    if boxes1.dim() < 2 or boxes2.dim() < 2:
        raise ValueError(
            f"{call}: sets of boxes must be (..., n, 4), got {tuple(boxes1.shape)} and {tuple(boxes2.shape)}"
        )
    return wide(boxes1)[..., :, None, :], wide(boxes2)[..., None, :, :]


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """|A ∩ B| and |A ∪ B|."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    width, height = (high - low).clamp(min=0).unbind(-1)
    common = width * height
    return common, areas(a) + areas(b) - common


@export("functional.box_iou", stable=True)
def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return the intersection over union of each box with each: |A ∩ B| / |A ∪ B|, in [0, 1].

    boxes1 (..., n, 4), boxes2 (..., m, 4); the result is (..., n, m), fp32, or fp64 for fp64 boxes. A reversed box
    has no area, and two boxes without area have an IoU of 0 (torchvision: NaN). A NaN stays in its row or column.

    >>> box_iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2], [5.0, 5, 6, 6]]))
    tensor([[0.3333, 0.0000]])
    """
    return ratio(*_overlap(*_sets("box_iou", boxes1, boxes2)))


@export("functional.generalized_box_iou", aliases=("functional.giou",))
def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return IoU - |C ∖ (A ∪ B)| / |C| of each box with each, in (-1, 1]: it falls as boxes without overlap move apart.

    Shapes and dtypes as `box_iou`. Rezatofighi et al. 2019, algorithm 1.

    >>> generalized_box_iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[2.0, 0, 4, 2], [4.0, 0, 6, 2]]))
    tensor([[ 0.0000, -0.3333]])
    """
    a, b = _sets("generalized_box_iou", boxes1, boxes2)
    common, union = _overlap(a, b)
    hull = areas(_hull(a, b))
    return ratio(common, union) - ratio(hull - union, hull)


@export("functional.distance_box_iou", aliases=("functional.diou",))
def distance_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """Return IoU - ρ² / (c² + eps) of each box with each: how far the centres lie apart beside the hull's diagonal.

    Shapes and dtypes as `box_iou`. Zheng et al. 2020, equation 7.

    >>> distance_box_iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[2.0, 0, 4, 2], [0.0, 0, 2, 2]]))
    tensor([[-0.2000,  1.0000]])
    """
    a, b = _sets("distance_box_iou", boxes1, boxes2)
    hull = _hull(a, b)
    diagonal = (hull[..., 2:] - hull[..., :2]).square().sum(-1)
    apart = ((a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2).square().sum(-1)
    return ratio(*_overlap(a, b)) - apart / (diagonal + eps)


@export("functional.complete_box_iou", aliases=("functional.ciou",))
def complete_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """Return DIoU - α v of each box with each, v = 4 / π² (atan(w₁ / h₁) - atan(w₂ / h₂))²: proportions count too.

    α = v / (1 - IoU + v + eps) is a weight, and has no gradient. Sides of less than 1e-6 count as that long. Shapes and
    dtypes as `box_iou`. Zheng et al. 2020, equations 8 to 11.

    >>> complete_box_iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[0.0, 0, 2, 1], [0.0, 0, 2, 2]]))
    tensor([[0.4655, 1.0000]])
    """
    a, b = _sets("complete_box_iou", boxes1, boxes2)
    (w_a, h_a), (w_b, h_b) = ((box[..., 2:] - box[..., :2]).clamp(min=SHORTEST).unbind(-1) for box in (a, b))
    v = 4 / math.pi**2 * (torch.atan2(w_a, h_a) - torch.atan2(w_b, h_b)).square()
    alpha = (v / (1 - ratio(*_overlap(a, b)) + v + eps)).detach()
    return distance_box_iou(boxes1, boxes2, eps) - alpha * v


def _hull(a: Tensor, b: Tensor) -> Tensor:
    """The smallest box around both."""
    return torch.cat((torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])), dim=-1)
