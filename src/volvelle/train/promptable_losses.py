"""Losses of promptable segmentation: focal and dice on masks that may cover part of a cell, the best of several masks.

    focal(p, t) = |t - p|^γ BCE(p, t)           mean over known cells
    dice(p, t)  = 1 - (2 Σ p t + 1) / (Σ p + Σ t + 1)

Kirillov et al. 2023, section 3: focal to dice as 20 to 1, the mean squared error of the estimated IoU added, and of the
masks of an ambiguous prompt only the one with the least loss learns; here the others may learn a little too. t is the
share of a cell (4 x 4 pixels) that the object covers, so that outlines are learnt finer than cells.

Shapes: b pictures, k prompts, m masks, y x cells.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FOCAL, GAMMA = 20.0, 2.0


def mask_losses(logits: Tensor, cover: Tensor, known: Tensor, weight_of_focal: float = FOCAL) -> Tensor:
    """20 focal + dice of each mask: logits (b, k, m, y, x), cover (b, k, y, x), known (b, y, x) -> (b, k, m).

    `weight_of_focal` is the 20. Focal loss wants probabilities to be right and dice wants masks to overlap: where a
    model is unsure of half of an object, the first leaves it out, and the second takes it in.

    >>> right = torch.tensor([[[[0.0, 1.0]]]])
    >>> sure = torch.tensor([[[[[-9.0, 9.0]], [[9.0, -9.0]]]]])
    >>> [round(x, 2) for x in mask_losses(sure, right, torch.ones(1, 1, 2)).flatten().tolist()]
    [0.0, 180.62]
    """
    logits, target, weight = logits.float(), cover.unsqueeze(2), known[:, None, None].float()
    p = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none")
    count = weight.sum((-2, -1)).clamp(min=1)
    focal = (weight * (target - p).abs().pow(GAMMA) * entropy).sum((-2, -1)) / count
    both = (weight * p * target).sum((-2, -1))
    either = (weight * p).sum((-2, -1)) + (weight * target).sum((-2, -1))
    return weight_of_focal * focal + 1 - (2 * both + 1) / (either + 1)


@torch.no_grad()
def overlaps(logits: Tensor, cover: Tensor, known: Tensor) -> Tensor:
    """IoU (b, k, m) of the masks logits > 0 with the objects, by the cells' known shares."""
    weight = known[:, None, None].float()
    seen, target = (logits > 0) * weight, cover.unsqueeze(2) * weight
    both = (target * (logits > 0)).sum((-2, -1))
    return both / (seen.sum((-2, -1)) + target.sum((-2, -1)) - both).clamp(min=1e-6)


def best_of(losses: Tensor, others: float = 0.0) -> Tensor:
    """(1 - others) min + others mean of the losses of each prompt's masks (b, k, m) -> (b, k).

    With 0 only the best mask gets a gradient, and the others may become anything: where the model ranks one of them
    first, the answer is far off. With a small share all stay sensible (Rupprecht et al. 2017, "Learning in an Uncertain
    World", section 3.2).

    >>> [round(float(best_of(torch.tensor([1.0, 2.0, 6.0]), others)), 2) for others in (0.0, 0.25, 1.0)]
    [1.0, 1.5, 3.0]
    """
    return (1 - others) * losses.amin(-1) + others * losses.mean(-1)
