"""Soft-NMS: Bodla et al. 2017, "Soft-NMS: Improving Object Detection With One Line of Code", section 3, figure 2.

    s_i ← s_i exp(-IoU(M, b_i)² / σ)                 gaussian, equation 3
    s_i ← s_i (1 - IoU(M, b_i))  where IoU ≥ N_t     linear, equation 2

M is the box with the highest score so far; it leaves with that score, the others' scores fall by how much they overlap
it, and so on until the best score left is below a threshold.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from volvelle.export import export
from volvelle.parts.regions.boxes import check_boxes, wide
from volvelle.parts.regions.iou import box_iou
from volvelle.parts.regions.order import stable_order


@export("functional.soft_nms")
@torch.no_grad()
def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    *,
    method: Literal["gaussian", "linear"] = "gaussian",
    idxs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (indices, scores) of the boxes in the order in which they leave, with the scores that are left to them.

    boxes (n, 4), scores (n); indices int64 and scores in fp32 or fp64, both (k), k the number whose score stays at or
    above `score_threshold`. `iou_threshold` (N_t) counts for "linear" alone, `sigma` for "gaussian". With `idxs` (n)
    only boxes of one group lower each other's scores. Boxes with NaNs lower none, NaN scores leave nothing. No
    gradient. Raises ValueError for shapes and numbers that do not fit. Bodla et al. 2017, section 3.

    >>> boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 5], [20.0, 0, 30, 10]])
    >>> soft_nms(boxes, torch.tensor([0.9, 0.8, 0.5]), method="linear")
    (tensor([0, 2, 1]), tensor([0.9000, 0.5000, 0.4000]))
    """
    check_boxes("soft_nms", boxes=boxes)
    if boxes.dim() != 2 or scores.shape != boxes.shape[:1] or (idxs is not None and idxs.shape != scores.shape):
        raise ValueError(
            f"soft_nms: boxes must be (n, 4), scores and idxs (n), got {tuple(boxes.shape)}, {tuple(scores.shape)} and "
            f"{None if idxs is None else tuple(idxs.shape)}"
        )
    if method not in ("gaussian", "linear") or not sigma > 0:
        raise ValueError(f'soft_nms: method must be "gaussian" or "linear" and sigma above 0, got {method!r}, {sigma}')
    overlap = box_iou(boxes, boxes).nan_to_num(0.0)
    if method == "gaussian":
        factors = torch.exp(-overlap.square() / sigma)
    else:
        factors = torch.where(overlap >= iou_threshold, 1 - overlap, 1.0)
    if idxs is not None:
        factors = torch.where(idxs[:, None] == idxs, factors, 1.0)
    return _leave(factors, wide(scores).to(factors.dtype), score_threshold)


def _leave(factors: Tensor, scores: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Let the best leave and multiply the others by its row of `factors` (n, n), until none reaches the threshold."""
    n = scores.shape[0]
    left = torch.where(scores >= threshold, scores, -math.inf)  # a NaN is not
    if torch.compiler.is_compiling():
        from torch._higher_order_ops.while_loop import while_loop  # brings the compiler with it

        never, least = torch.full_like(left, n, dtype=torch.int64), torch.full_like(left, threshold)
        start = (left, never, torch.zeros((1,), dtype=torch.int64, device=left.device), scores, factors)

        def more(left: Tensor, turn: Tensor, step: Tensor, final: Tensor, factors: Tensor) -> Tensor:
            return (left >= least).sum() > 0  # a runtime may find that any of no numbers is true

        def leave(left: Tensor, turn: Tensor, step: Tensor, final: Tensor, factors: Tensor) -> tuple[Tensor, ...]:
            best = left.argmax(0, keepdim=True)
            this = torch.zeros_like(left, dtype=torch.bool).scatter(0, best, True)
            after = torch.where(this, -math.inf, left * factors.index_select(0, best)[0])
            return after, torch.where(this, step, turn), step + 1, torch.where(this, left, final), factors.clone()

        _, turn, _, final, _ = while_loop(more, leave, start)
        order = stable_order(turn)
        order = order[(turn[order] < n).nonzero()[:, 0]]
        return order, final[order]
    order, final = [], []
    for _ in range(n):
        value, best = left.max(0)
        if not value >= threshold:
            break
        order.append(best)
        final.append(value)
        left = left * factors[best]
        left[best] = -math.inf
    if not order:
        return torch.zeros(0, dtype=torch.int64, device=scores.device), scores[:0]
    return torch.stack(order), torch.stack(final)
