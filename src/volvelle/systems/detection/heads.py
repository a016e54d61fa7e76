"""What is said of a region: scores of the classes and how its box should move; and the loss of that.

Logits have C + 1 columns, the last one for background; deltas are of any class. r regions in all, n an image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from volvelle.parts.convolution.separable import PointwiseConv2d
from volvelle.systems.detection.losses import box_losses, mean_over, sum_over
from volvelle.systems.detection.matching import Matches, match
from volvelle.systems.detection.sampling import Sampler
from volvelle.systems.detection.targets import Regions, Targets, pick, rois

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""Weights of the head's deltas: about one over their deviations, so that their loss is of size one (Fast R-CNN)."""


class Scored(NamedTuple):
    """Logits (b, n, C + 1), background last, and deltas (b, n, 4) of regions."""

    logits: Tensor
    deltas: Tensor


class FullyConnected(nn.Module):
    """Pool each region of `channels` maps to `inputs` numbers; layers of `hidden` units with ReLU; scores and deltas.

    With a position-sensitive pool and one layer this is ThunderNet's head (Qin et al. 2019, section 3.2), with RoIAlign
    and two Faster R-CNN's. `pool` is one of pools.py. A region costs inputs · hidden products.
    """

    def __init__(self, pool: nn.Module, channels: int, inputs: int, hidden: Sequence[int], classes: int):
        super().__init__()
        self.pool, self.channels = pool, channels
        widths = [inputs, *hidden]
        self.layers = nn.Sequential()
        for before, after in itertools.pairwise(widths):
            self.layers.extend((nn.Linear(before, after), nn.ReLU(inplace=True)))
        self.classes, self.deltas = nn.Linear(widths[-1], classes + 1), nn.Linear(widths[-1], 4)
        _begin(self.classes, 0.01)
        _begin(self.deltas, 0.001)

    def forward(self, features: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (r, C + 1) and deltas (r, 4) of regions (r, 5) on features (b, c, y, x)."""
        seen = self.layers(self.pool(features, regions, features).flatten(1))
        return self.classes(seen), self.deltas(seen)


class PositionSensitive(nn.Module):
    """R-FCN's head: Dai et al. 2016, section 2.2, equation 1.

    k² maps a class, computed once for the picture; bin (i, j) of a region averages the map of its place alone, and the
    region's score is the mean over its bins. There is not one weight, and no product, for a single region.
    """

    def __init__(self, pool: nn.Module, channels: int, bins: int, classes: int):
        super().__init__()
        self.pool, self.channels = pool, channels
        self.classes = PointwiseConv2d(channels, bins * bins * (classes + 1))
        self.deltas = PointwiseConv2d(channels, bins * bins * 4)
        _begin(self.classes, 0.01)
        _begin(self.deltas, 0.001)

    def forward(self, features: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (r, C + 1) and deltas (r, 4) of regions (r, 5) on features (b, c, y, x)."""
        # One pooling for both: its samples lie at the same places.
        maps = torch.cat((self.classes(features), self.deltas(features)), 1)
        votes = self.pool(maps, regions, features).mean((2, 3))
        return votes[:, :-4], votes[:, -4:]


class RoIHead(nn.Module):
    """A scorer of regions, and the choice of those that it learns from. `classes` is C."""

    def __init__(self, scorer: nn.Module, sampler: Sampler, classes: int):
        super().__init__()
        self.scorer, self.sampler, self.classes = scorer, sampler, classes

    def forward(self, features: Tensor, boxes: Tensor) -> Scored:
        """Score boxes (b, n, 4) on features (b, c, y, x)."""
        b, n = boxes.shape[:2]
        logits, deltas = self.scorer(features, rois(boxes))
        return Scored(logits.float().view(b, n, -1), deltas.float().view(b, n, 4))

    def losses(self, features: Tensor, regions: Regions, targets: Targets) -> dict[str, Tensor]:
        """`classes` and `boxes`, over the number of regions that count; the objects themselves are regions too."""
        boxes = torch.cat((regions.boxes, targets.boxes), 1)
        there = torch.cat((regions.mask, targets.wanted), 1)
        overlap = self.sampler.options.overlap
        found = match(boxes, targets, positive=overlap, negative=overlap)
        chosen = self.sampler.before(Matches(found.index, found.positive & there, found.negative & there))
        boxes, owner = pick(boxes, chosen.index), pick(found.index, chosen.index)
        positive = pick(found.positive, chosen.index) & chosen.mask
        logits, deltas = self(features, boxes)
        labels = torch.where(positive, pick(targets.labels, owner), self.classes)
        classes = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        moves = box_losses(deltas, boxes, pick(targets.boxes, owner), positive, weights=WEIGHTS, beta=1.0)
        counts = self.sampler.after(classes + moves, chosen.mask)
        return {
            "classes": mean_over(classes, counts),
            "boxes": sum_over(moves, counts & positive) / counts.sum().clamp(min=1),
        }


def _begin(layer: nn.Linear | nn.Conv2d, deviation: float) -> None:
    nn.init.normal_(layer.weight, 0.0, deviation)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
