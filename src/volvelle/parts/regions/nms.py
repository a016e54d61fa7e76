"""Non-maximum suppression: of boxes that overlap, keep the one with the highest score.

    Going down the scores, keep box i unless IoU(i, j) > threshold for some j kept before it.

Greedy, as in Girshick et al. 2014 (R-CNN), section 2.3. On a CPU only pairs that lie above each other along x are
compared where these are few: sorted by x1, they are runs. Where they are many the boxes are taken in blocks: within a
block the pairs are walked through as bits of Python's integers, then the block's survivors strike out all later boxes
at once. Everywhere else the same set is found as the one fixed point of

    keep_i = no j < i with keep_j and IoU(i, j) > threshold,

which iteration from keep = 1 reaches: after k rounds the first k boxes are right, in practice 2 to 5 rounds do. That
form has no shape that depends on the values, so it compiles and exports as one loop.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from volvelle.export import export
from volvelle.parts.regions.boxes import check_boxes, wide
from volvelle.parts.regions.iou import areas
from volvelle.parts.regions.order import stable_order

BLOCK = 64
RUN, MOST_PAIRS = 256, 1 << 22  # pairs a box, and in all, up to which runs take less time and memory than blocks


@export("functional.nms", stable=True)
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices of the boxes to keep, int64, highest score first; of equal scores the earlier box is first.

    boxes (n, 4) as x1 y1 x2 y2, scores (n), 0 <= iou_threshold <= 1. A box falls when its IoU with a kept one,
    rounded to the boxes' dtype (at least fp32), is above the threshold; boxes without area, reversed boxes and NaNs
    neither fall nor strike. A NaN score comes last (torchvision: first). No gradient. Raises ValueError for shapes or
    thresholds that do not fit. Girshick et al. 2014, section 2.3.

    >>> boxes = torch.tensor([[0.0, 0, 10, 10], [1.0, 0, 11, 10], [20.0, 0, 30, 10]])
    >>> nms(boxes, torch.tensor([0.8, 0.9, 0.3]), 0.5)
    tensor([1, 2])
    """
    _check("nms", boxes, scores, iou_threshold)
    return _suppress(boxes, scores, None, iou_threshold)


@export("functional.batched_nms", stable=True)
def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices to keep as `nms` does, where only boxes of one group (a class, an image) strike each other.

    `idxs` (n), any integers. Groups are compared as numbers and boxes are not moved apart, so the result is exact for
    every group number and coordinate.

    >>> boxes = torch.tensor([[0.0, 0, 10, 10], [1.0, 0, 11, 10], [1.0, 0, 11, 10]])
    >>> batched_nms(boxes, torch.tensor([0.8, 0.9, 0.3]), torch.tensor([7, 7, 1202]), 0.5)
    tensor([1, 2])
    """
    _check("batched_nms", boxes, scores, iou_threshold)
    if idxs.shape != scores.shape or idxs.is_floating_point() or idxs.is_complex():
        raise ValueError(
            f"batched_nms: idxs must be {tuple(scores.shape)} integers, got {idxs.dtype} of shape {tuple(idxs.shape)}"
        )
    return _suppress(boxes, scores, idxs, iou_threshold)


def _check(call: str, boxes: Tensor, scores: Tensor, threshold: float) -> None:
    check_boxes(call, boxes=boxes)
    if boxes.dim() != 2 or scores.shape != boxes.shape[:1]:
        raise ValueError(
            f"{call}: boxes must be (n, 4) and scores (n), got {tuple(boxes.shape)} and {tuple(scores.shape)}"
        )
    if not 0 <= threshold <= 1:
        raise ValueError(f"{call}: iou_threshold must be in [0, 1], got {threshold}")


@torch.no_grad()
def _suppress(boxes: Tensor, scores: Tensor, groups: Tensor | None, threshold: float) -> Tensor:
    ranked = by_score(scores)
    boxes = wide(boxes)
    if boxes.device.type != "cpu" or torch.compiler.is_compiling():
        sorted_groups = None if groups is None else groups[ranked]
        return ranked[fixed_point(boxes[ranked], sorted_groups, threshold).nonzero()[:, 0]]
    if groups is None:
        return ranked[_of_sorted(boxes[ranked], None, threshold)]
    sorted_groups, by_group = groups[ranked].sort(stable=True)
    order = ranked[by_group]
    kept = by_group[_of_sorted(boxes[order], sorted_groups, threshold)]
    return ranked[kept.sort().values]


def by_score(scores: Tensor) -> Tensor:
    """The order of falling scores, NaNs last, equal ones as they came."""
    return stable_order(torch.where(scores.isnan(), -math.inf, wide(scores)), descending=True)


def fixed_point(boxes: Tensor, groups: Tensor | None, threshold: float) -> Tensor:
    """Which of the boxes (n, 4), sorted by falling score, stay: (n) bool, from all pairs at once."""
    planes = _planes(boxes)
    strikes = (_iou(planes[:, :, None], planes).double() > threshold).triu(1)
    if groups is not None:
        strikes = strikes & (groups[:, None] == groups)

    def again(keep: Tensor, before: Tensor, strikes: Tensor) -> Tensor:
        return (keep != before).sum() > 0  # a runtime may find that any of no numbers is true

    def narrow(keep: Tensor, before: Tensor, strikes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ~(strikes & keep[:, None]).any(0), keep.clone(), strikes.clone()

    keep = torch.ones_like(boxes[:, 0], dtype=torch.bool)
    state = (keep, ~keep, strikes)
    if torch.compiler.is_compiling():
        from torch._higher_order_ops.while_loop import while_loop  # brings the compiler with it

        return while_loop(again, narrow, state)[0]
    while bool(again(*state)):
        state = (~(strikes & state[0][:, None]).any(0), state[0], strikes)
    return state[0]


def _of_sorted(boxes: Tensor, groups: Tensor | None, threshold: float) -> Tensor:
    """Where the sorted boxes that stay lie, int64 in rising order; groups lie together, each by falling score."""
    cut = _rounded_down(threshold, boxes.dtype)
    order, runs = _runs(boxes, groups)
    if int(runs.sum()) <= min(RUN * len(boxes), MOST_PAIRS):
        return _in_runs(boxes, order, runs, cut)
    return _in_blocks(boxes, groups, cut)


def _runs(boxes: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """The order (n) of boxes by group and x1, and how many behind each one there begin left of its right side."""
    n = len(boxes)
    left, order = boxes[:, 0].sort()
    begin = torch.searchsorted(left, boxes[:, 2].contiguous())
    places = torch.empty_like(order).scatter_(0, order, torch.arange(n))
    if groups is not None:  # whole numbers, so that no group and no coordinate is rounded
        first = torch.searchsorted(groups, groups) * (n + 1)
        places, order = (first + places).sort()
        begin = torch.searchsorted(places, first + begin)
    return order, (begin[order] - torch.arange(1, n + 1)).clamp_(min=0)


def _in_runs(boxes: Tensor, order: Tensor, runs: Tensor, cut: float) -> Tensor:
    """`_of_sorted` by the pairs of each box with the run behind it; no other pair has anything in common."""
    n, planes = len(boxes), _planes(boxes)[:, order]
    i = torch.repeat_interleave(runs)
    j = torch.arange(len(i)) + (torch.arange(1, n + 1) + runs - runs.cumsum(0))[i]
    top, bottom = planes[1], planes[3]
    meet = ((top[i] < bottom[j]) & (top[j] < bottom[i])).nonzero()[:, 0]
    i, j = i[meet], j[meet]
    strikes = (_iou(planes[:, i], planes[:, j]) > cut).nonzero()[:, 0]
    i, j = order[i[strikes]], order[j[strikes]]
    strikers, by_score = torch.minimum(i, j).sort()
    struck = bytearray(n)
    for striker, falls in zip(strikers.tolist(), torch.maximum(i, j)[by_score].tolist(), strict=True):
        if not struck[striker]:  # all that could strike it came before
            struck[falls] = 1
    return torch.tensor([place for place, falls in enumerate(struck) if not falls], dtype=torch.int64)


def _in_blocks(boxes: Tensor, groups: Tensor | None, cut: float) -> Tensor:
    """`_of_sorted` by blocks of boxes."""
    n, planes = len(boxes), _planes(boxes)
    ends = [n] * n if groups is None else torch.searchsorted(groups, groups, right=True).tolist()
    struck = torch.zeros(n, dtype=torch.bool)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        alive = start + (~struck[start:stop]).nonzero()[:, 0]
        head = planes[:, alive]
        pairs = _iou(head[:, :, None], head) > cut
        if groups is not None:
            pairs &= groups[alive, None] == groups[alive]
        keep = _walk(pairs)
        falls = torch.ones(len(alive), dtype=torch.bool)
        falls[keep] = False
        struck[alive[falls]] = True
        last = ends[stop - 1]
        rest = stop + (~struck[stop:last]).nonzero()[:, 0]
        if not len(rest):
            continue
        strikers = alive[keep]
        if groups is not None:
            strikers = strikers[groups[strikers] == groups[stop - 1]]
        struck[rest] = (_iou(planes[:, strikers, None], planes[:, rest]) > cut).any(0)
    return (~struck).nonzero()[:, 0]


def _walk(pairs: Tensor) -> list[int]:
    """The greedy choice among a few boxes, pairs (n, n) saying who strikes whom; a row is the bytes of one integer."""
    n, table = len(pairs), pairs.numpy().tobytes()
    struck, keep = 0, []
    for i in range(n):
        if not struck >> 8 * i & 1:
            keep.append(i)
            struck |= int.from_bytes(table[i * n : (i + 1) * n], "little")
    return keep


def _planes(boxes: Tensor) -> Tensor:
    """x1, y1, x2, y2 and area as rows of (5, n)."""
    return torch.cat((boxes.T, areas(boxes)[None]))


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of planes (5, …) and (5, …) that broadcast; NaN without any area, in place for the sake of the cache."""
    x1, y1, x2, y2, own = a
    width = torch.minimum(x2, b[2]).sub_(torch.maximum(x1, b[0])).clamp_(min=0)
    common = torch.minimum(y2, b[3]).sub_(torch.maximum(y1, b[1])).clamp_(min=0).mul_(width)
    return common / (own + b[4]).sub_(common)


def _rounded_down(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` up to `threshold`: x > it as x > threshold, for every x of that dtype."""
    near = torch.tensor(threshold, dtype=dtype)
    below = torch.nextafter(near, torch.tensor(-math.inf, dtype=dtype))
    return cast(float, (below if near.item() > threshold else near).item())
