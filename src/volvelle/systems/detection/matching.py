"""Which box is responsible for which object: by overlap, and for each object its best ones in any case.

Ren et al. 2015, "Faster R-CNN", section 3.1.2, with the best k anchors of an object in place of the one, so that small
objects, which no anchor overlaps much, teach as many of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from volvelle.parts.regions.iou import areas, box_iou
from volvelle.systems.detection.targets import Targets


class Matches(NamedTuple):
    """For each box: its object (b, n) int64, 0 where there is none; whether it is positive, negative, or neither."""

    index: Tensor
    positive: Tensor
    negative: Tensor


def match(
    boxes: Tensor, targets: Targets, *, positive: float, negative: float, best: int = 0, floor: float = 0.0
) -> Matches:
    """Match boxes (b, n, 4), or (n, 4) for all images, with the objects of each image (one row at least).

    Positive: an IoU from `positive` on with an object, which is then the box's; or among the `best` boxes of an object,
    if their IoU is above 0 and from `floor` on. Negative: the largest IoU is below `negative`, and no ignored object
    covers half of the box. What is neither takes no part.
    """
    wanted = targets.wanted
    boxes = boxes.expand(len(wanted), *boxes.shape[-2:])
    overlap = torch.where(wanted.unsqueeze(1), box_iou(boxes, targets.boxes), -1.0).nan_to_num(nan=-1.0)
    highest, index = overlap.max(2)
    chosen = highest >= positive
    if best and boxes.shape[1]:
        value, place = overlap.transpose(1, 2).topk(min(best, boxes.shape[1]), 2)
        found = (value >= floor) & (value > 0)
        claimed = torch.zeros_like(overlap, dtype=torch.bool).scatter_(1, place.transpose(1, 2), found.transpose(1, 2))
        nearest, owner = torch.where(claimed, overlap, -1.0).max(2)
        index = torch.where(~chosen & (nearest > 0), owner, index)
        chosen = chosen | (nearest > 0)
    unwanted = (highest < negative) & ~chosen
    ignored = targets.mask & targets.ignored
    if bool(ignored.any()):
        unwanted = unwanted & ~covered(boxes, targets.boxes, ignored)
    return Matches(index, chosen, unwanted)


def covered(boxes: Tensor, others: Tensor, mask: Tensor) -> Tensor:
    """Which boxes (b, n, 4) lie by half or more inside one of the others (b, m, 4) of the mask (b, m): (b, n) bool."""
    first, second = boxes.unsqueeze(2), others.unsqueeze(1)
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    # A reversed overlap has no area.
    inside, area = areas(torch.cat((low, high), -1)), areas(first)
    return ((inside >= 0.5 * area) & (area > 0) & mask.unsqueeze(1)).any(2)
