"""Non-maximum suppression over padded boxes: masks in, masks out, the same for every image of a batch.

Greedy suppression itself is `volvelle.functional.nms`; here it meets padding. Rows must be sorted by score, best first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from volvelle.parts.regions.nms import batched_nms, fixed_point, nms
from volvelle.parts.regions.order import stable_order
from volvelle.systems.detection.targets import Chosen


def keep_mask(boxes: Tensor, valid: Tensor, overlap: float, labels: Tensor | None = None) -> Tensor:
    """Which of the valid (b, n) boxes (b, n, 4) suppression keeps: (b, n) bool; within equal labels (b, n) only.

    Boxes that are not valid suppress nothing.
    """
    n = boxes.shape[1]
    # Without an area they overlap nothing.
    boxes = boxes.masked_fill(~valid.unsqueeze(-1), 0.0)
    order = torch.arange(n, 0, -1, device=boxes.device, dtype=boxes.dtype)
    rows = []
    for number, some in enumerate(boxes):
        group = None if labels is None else labels[number]
        if torch.compiler.is_compiling():  # every size must be known: masks, not lists of what is kept
            rows.append(fixed_point(some, group, overlap))
            continue
        kept = nms(some, order, overlap) if group is None else batched_nms(some, order, group, overlap)
        rows.append(torch.zeros_like(valid[number]).index_fill(0, kept, True))
    return torch.stack(rows) & valid


def first_kept(keep: Tensor, count: int) -> Chosen:
    """The first `count` rows that keep (b, n) names, in their order, filled up with others.

    >>> first_kept(torch.tensor([[False, True, False, True]]), 3)
    Chosen(index=tensor([[1, 3, 0]]), mask=tensor([[ True,  True, False]]))
    """
    n = keep.shape[1]
    order = stable_order((~keep).to(torch.uint8))[:, : min(count, n)]
    return Chosen(order, keep.gather(1, order))
