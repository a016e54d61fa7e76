"""Region proposal network: Ren et al. 2015, "Faster R-CNN", section 3.1; and light as in ThunderNet, with its spatial
attention: Qin et al. 2019, sections 3.2 and 3.3.

    F = body(map),   objectness = w_o F,   deltas = w_d F        a scores and a boxes a place, one for each anchor
    features = map · σ(norm(w_a F))                              spatial attention, where there is one

What the proposer learnt to see, foreground against background, so re-weights the map that the head pools from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from volvelle.parts.convolution.atrous import AtrousConv2d
from volvelle.parts.convolution.separable import PointwiseConv2d
from volvelle.parts.regions.boxes import clip_boxes, decode_boxes
from volvelle.systems.detection.anchors import centred_within, grid_anchors
from volvelle.systems.detection.config import RPN
from volvelle.systems.detection.losses import box_losses, mean_over, objectness_losses, sum_over
from volvelle.systems.detection.matching import match
from volvelle.systems.detection.sampling import draw
from volvelle.systems.detection.suppression import first_kept, keep_mask
from volvelle.systems.detection.targets import Regions, Targets, pick


class Proposed(NamedTuple):
    """The network's answers: objectness (b, n), deltas (b, n, 4) of anchors (n, 4), features (b, c, y, x) for heads."""

    objectness: Tensor
    deltas: Tensor
    anchors: Tensor
    features: Tensor


class SpatialAttention(nn.Module):
    """features · σ(norm(1 x 1 of what the proposer made)): Qin et al. 2019, section 3.3."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.conv = PointwiseConv2d(width, channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, features: Tensor, seen: Tensor) -> Tensor:
        """Re-weight features (b, channels, y, x) by seen (b, width, y, x)."""
        return features * self.norm(self.conv(seen)).sigmoid()


class Unweighted(nn.Module):
    """No attention: features as they are."""

    def forward(self, features: Tensor, seen: Tensor) -> Tensor:
        """Features."""
        return features


def dense_body(channels: int, width: int) -> nn.Sequential:
    """3 x 3 and ReLU: Faster R-CNN's."""
    return nn.Sequential(AtrousConv2d(channels, width, 3), nn.ReLU(inplace=True))


def light_body(channels: int, width: int) -> nn.Sequential:
    """5 x 5 depthwise and 1 x 1, each with its norm: ThunderNet's."""
    return nn.Sequential(
        AtrousConv2d(channels, channels, 5, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        PointwiseConv2d(channels, width, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )


class RegionProposer(nn.Module):
    """Proposes regions from one map of stride `stride`; `body` turns it into `width` channels that all answers read."""

    def __init__(self, options: RPN, body: nn.Module, width: int, *, stride: int, attention: nn.Module | None = None):
        super().__init__()
        self.options, self.stride = options, stride
        self.body = body
        self.attention = attention or Unweighted()
        self.objectness = PointwiseConv2d(width, len(options.anchors))
        self.deltas = PointwiseConv2d(width, 4 * len(options.anchors))
        for layer in (self.objectness, self.deltas):
            nn.init.normal_(layer.weight, 0.0, 0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, map: Tensor, features: Tensor) -> Proposed:
        """Look at `map` (b, c, y, x); `features` are the head's, which the attention re-weights."""
        seen = self.body(map)
        size = seen.shape[-2:]
        # No buffer: a cast of the weights to bf16 must not round it.
        shapes = torch.tensor(self.options.anchors, dtype=torch.float32, device=seen.device)
        anchors = grid_anchors(shapes, (self.stride, self.stride), size)
        deltas = self.deltas(seen).unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
        objectness = self.objectness(seen).permute(0, 2, 3, 1).flatten(1)
        return Proposed(objectness.float(), deltas.float(), anchors, self.attention(features, seen))

    @torch.no_grad()
    def propose(self, found: Proposed, sizes: Tensor, count: int) -> Regions:
        """At most `count` regions an image of sizes (b, 2), best first: decoded, clipped, suppressed, padded.

        An anchor centred beside its picture, a NaN, and a box of less than a pixel is never proposed.
        """
        options = self.options
        usable = centred_within(found.anchors, sizes) & ~found.objectness.isnan()
        scores = found.objectness.masked_fill(~usable, float("-inf"))
        scores, index = scores.topk(min(options.before, scores.shape[1]), 1)
        boxes = clip_boxes(decode_boxes(pick(found.deltas, index), found.anchors[index]), sizes[:, None])
        valid = (boxes[..., 2:] - boxes[..., :2] >= 1).all(-1) & (scores > float("-inf"))
        kept = first_kept(keep_mask(boxes, valid, options.overlap), count)
        scores, boxes = pick(scores, kept.index).sigmoid(), pick(boxes, kept.index)
        hidden = ~kept.mask
        return Regions(boxes.masked_fill(hidden.unsqueeze(-1), 0.0), scores.masked_fill(hidden, 0.0), kept.mask)

    def losses(self, found: Proposed, sizes: Tensor, targets: Targets) -> dict[str, Tensor]:
        """`objectness` and `proposal_boxes`, both over the number of sampled anchors of the batch."""
        options = self.options
        usable = centred_within(found.anchors, sizes)
        matches = match(
            found.anchors, targets, positive=options.positive, negative=options.negative, best=options.best,
            floor=options.floor,
        )  # fmt: skip
        positive, negative = draw(matches, options.sampled, 0.5, usable)
        drawn = positive | negative
        objects = pick(targets.boxes, matches.index)
        anchors = found.anchors.expand_as(objects)
        boxes = box_losses(found.deltas, anchors, objects, positive, weights=(1, 1, 1, 1), beta=1 / 9)
        return {
            "objectness": mean_over(objectness_losses(found.objectness, positive), drawn),
            "proposal_boxes": sum_over(boxes, positive) / drawn.sum().clamp(min=1),
        }
