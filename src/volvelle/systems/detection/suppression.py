"""Non-maximum suppression over padded boxes: masks in, masks out, the same for every image of a batch.

Greedy suppression itself is `volvelle.functional.nms`; here it meets padding. Rows must be sorted by score, best first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from volvelle.parts.regions.nms import batched_nms, nms
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
    for number in range(boxes.shape[0]):
        if labels is None:
            kept = nms(boxes[number], order, overlap)
        else:
            kept = batched_nms(boxes[number], order, labels[number], overlap)
        rows.append(torch.zeros_like(valid[number]).index_fill(0, kept, True))
    return torch.stack(rows) & valid


def first_kept(keep: Tensor, count: int) -> Chosen:
    """The first `count` rows that keep (b, n) names, in their order, filled up with others.

    >>> first_kept(torch.tensor([[False, True, False, True]]), 3)
    Chosen(index=tensor([[1, 3, 0]]), mask=tensor([[ True,  True, False]]))
    """
    n = keep.shape[1]
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, : min(count, n)]
    return Chosen(order, keep.gather(1, order))
