"""Which boxes make the loss: drawn at random, in turns over objects, or those that are hardest."""

from __future__ import annotations

import torch
from torch import Tensor

from volvelle.systems.detection.config import Balanced, Hardest, Sampling
from volvelle.systems.detection.matching import Matches
from volvelle.systems.detection.targets import Chosen, pick


def lowest(keys: Tensor, among: Tensor, count: Tensor | int) -> Tensor:
    """Mark the `count` (one number, or (b, 1)) entries of lowest key in each row of those that `among` (b, n) names.

    >>> lowest(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), torch.tensor([[True, True, True, False]]), 2)
    tensor([[False,  True,  True, False]])
    """
    rank = keys.masked_fill(~among, float("inf")).argsort(dim=1, stable=True).argsort(dim=1)
    return among & (rank < count)


def draw(matches: Matches, count: int, share: float, usable: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Random positives, at most `share` of `count`, and negatives that fill up: two masks (b, n)."""
    positive, negative = matches.positive, matches.negative
    if usable is not None:
        positive, negative = positive & usable, negative & usable
    keys = torch.rand(positive.shape, device=positive.device)
    positive = lowest(keys, positive, int(count * share))
    return positive, lowest(keys, negative, count - positive.sum(1, keepdim=True))


def turns(matches: Matches) -> Tensor:
    """Random keys (b, n) by which objects take turns: an object's first box comes before any object's second.

    The integer part is the number of boxes of the same object with a lower draw.
    """
    draws = torch.rand(matches.index.shape, device=matches.index.device)
    both = matches.positive.unsqueeze(2) & matches.positive.unsqueeze(1)
    same = both & (matches.index.unsqueeze(2) == matches.index.unsqueeze(1))
    return (same & (draws.unsqueeze(1) < draws.unsqueeze(2))).sum(2) + draws


class BalancedSampler:
    """`config.Balanced`: positives in turns over their objects, negatives drawn at random, before the head."""

    def __init__(self, options: Balanced):
        self.options = options

    def before(self, matches: Matches) -> Chosen:
        """The regions that the head is asked for."""
        options = self.options
        positive = lowest(turns(matches), matches.positive, int(options.count * options.foreground))
        keys = torch.rand(positive.shape, device=positive.device)
        negative = lowest(keys, matches.negative, options.count - positive.sum(1, keepdim=True))
        chosen = positive | negative
        index = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, : options.count]
        return Chosen(index, pick(chosen, index))

    def after(self, losses: Tensor, mask: Tensor) -> Tensor:
        """Which of the scored regions (b, k) the loss is taken of: all."""
        return mask


class HardestSampler:
    """`config.Hardest`: the head is asked for all regions, and learns from those of the highest loss."""

    def __init__(self, options: Hardest):
        self.options = options

    def before(self, matches: Matches) -> Chosen:
        """All regions, of which the positive and negative ones count."""
        numbers = torch.arange(matches.index.shape[1], device=matches.index.device)
        return Chosen(numbers.expand_as(matches.index), matches.positive | matches.negative)

    def after(self, losses: Tensor, mask: Tensor) -> Tensor:
        """The `count` of the highest loss in each image."""
        return lowest(-losses.detach(), mask, self.options.count)


Sampler = BalancedSampler | HardestSampler


def build_sampler(options: Sampling) -> Sampler:
    """The sampler of a configuration."""
    return HardestSampler(options) if isinstance(options, Hardest) else BalancedSampler(options)
