"""What detectors are told and what they tell: boxes of several images in one tensor, padded, with a mask beside it.

b images, m objects or n regions in the fullest of them. Boxes are x1 y1 x2 y2 in pixels of the batch's images; class
numbers are 0 … C - 1. Rows that the mask does not name are padding: zeros, which nothing reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Targets(NamedTuple):
    """The objects: boxes (b, m, 4), labels (b, m) int64, mask (b, m) bool, ignored (b, m) bool.

    `ignored` marks objects that are neither to be found nor to be mistaken for background: crowds, VOC's difficult.
    """

    boxes: Tensor
    labels: Tensor
    mask: Tensor
    ignored: Tensor

    @property
    def wanted(self) -> Tensor:
        """Objects to be found (b, m): neither padding, nor ignored, nor without an area."""
        sides = self.boxes[..., 2:] - self.boxes[..., :2]
        return self.mask & ~self.ignored & (sides > 0).all(-1)

    def to(self, device: torch.device | str) -> Targets:
        """The same on another device."""
        return Targets(*(part.to(device) for part in self))


class Regions(NamedTuple):
    """Where a proposer expects objects, best first: boxes (b, n, 4), scores (b, n), mask (b, n) bool."""

    boxes: Tensor
    scores: Tensor
    mask: Tensor


class Chosen(NamedTuple):
    """Rows of something: their numbers index (b, k), and which of these count: mask (b, k) bool; the others fill up."""

    index: Tensor
    mask: Tensor


class Detections(NamedTuple):
    """What was found, best first: boxes (b, n, 4), scores (b, n), labels (b, n) int64, mask (b, n) bool."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    mask: Tensor


def collate(
    boxes: Sequence[Tensor], labels: Sequence[Tensor], ignored: Sequence[Tensor] | None = None, *, least: int = 0
) -> Targets:
    """Pad the objects of several images: boxes (m_i, 4), labels (m_i), ignored (m_i); at least `least` rows.

    >>> collate([torch.ones(2, 4), torch.zeros(0, 4)], [torch.tensor([3, 1]), torch.zeros(0)]).mask
    tensor([[ True,  True],
            [False, False]])
    """
    most = max(least, *(len(one) for one in boxes)) if boxes else least
    ignored = ignored or [torch.zeros(len(one), dtype=torch.bool) for one in boxes]

    def padded(parts: Sequence[Tensor], dtype: torch.dtype, *width: int) -> Tensor:
        filled = [F.pad(part.to(dtype).view(-1, *width), (0, 0) * len(width) + (0, most - len(part))) for part in parts]
        return torch.stack(filled) if filled else torch.zeros(0, most, *width, dtype=dtype)

    mask = [torch.ones(len(one), dtype=torch.bool) for one in boxes]
    return Targets(
        padded(boxes, torch.float32, 4), padded(labels, torch.int64), padded(mask, torch.bool),
        padded(ignored, torch.bool),
    )  # fmt: skip


def rois(boxes: Tensor) -> Tensor:
    """Boxes (b, n, 4) of a batch as rows (b n, 5), the image's number first."""
    b, n = boxes.shape[:2]
    numbers = torch.arange(b, device=boxes.device, dtype=boxes.dtype).view(b, 1, 1).expand(b, n, 1)
    return torch.cat((numbers, boxes), 2).flatten(0, 1)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Rows index (b, k) of values (b, n) or (b, n, d)."""
    if values.dim() == 2:
        return values.gather(1, index)
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
