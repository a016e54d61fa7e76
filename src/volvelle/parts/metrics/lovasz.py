"""Lovász-softmax: a loss that follows the mean IoU itself, class by class, where cross-entropy follows single pixels.

Berman et al. 2018, "The Lovász-Softmax Loss: A Tractable Surrogate for the Optimization of the Intersection-Over-Union
Measure in Neural Networks", equations 8 to 12. With p_c a class's probabilities and y_c its pixels,

    m_i(c) = 1 - p_i(c) where y_i = c, else p_i(c);     loss = mean_c  Σ_i m_π(i)(c) g_i(c),   π sorts m downwards

    g_i = J_i - J_i-1,     J_i = 1 - |y_c ∖ {π_1 … π_i}| / |y_c ∪ {π_1 … π_i}|

J_i is the Jaccard loss when the i worst pixels are wrong. The sum is its tightest convex extension: exact where every
probability is 0 or 1, and with a gradient in between.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from volvelle.export import export


@export("functional.lovasz_softmax")
def lovasz_softmax(
    probabilities: Tensor,
    target: Tensor,
    *,
    ignore_index: int | None = 255,
    classes: Literal["present", "all"] = "present",
) -> Tensor:
    """Return the Lovász-softmax loss, a number in [0, 1], over all pixels of the batch together.

    probabilities (b, k, …) floating point, target (b, …) integer. Pixels of `ignore_index` are left out; another
    label that is no class belongs to none. "present" averages over the classes that the target has; "all" adds the
    others, whose loss is the largest wrong probability. Zero (with a gradient of zero) where no pixel is left. Costs
    one sort of the pixels a class.

    Raises ValueError for shapes that do not fit. Berman et al. 2018, section 3.

    >>> scores = torch.tensor([[[0.9, 0.4], [0.1, 0.6]]])  # two pixels, two classes
    >>> lovasz_softmax(scores, torch.tensor([[0, 1]])).round(decimals=3)
    tensor(0.3250)
    """
    if probabilities.ndim < 2 or target.shape != probabilities.shape[:1] + probabilities.shape[2:]:
        raise ValueError(
            "lovasz_softmax: probabilities must be (b, k, …) and target (b, …), got "
            f"{tuple(probabilities.shape)} and {tuple(target.shape)}"
        )
    k = probabilities.shape[1]
    p = probabilities.movedim(1, -1).reshape(-1, k)
    y = target.reshape(-1)
    if ignore_index is not None:
        kept = (y != ignore_index).nonzero().flatten()
        p, y = p.index_select(0, kept), y.index_select(0, kept)
    if not len(y):
        return probabilities.sum() * 0.0
    own = y[:, None] == torch.arange(k, device=y.device)
    if classes == "present":
        there = own.any(0).nonzero().flatten()
        p, own = p.index_select(1, there), own.index_select(1, there)
    truth = own.to(p.dtype)
    errors, order = (truth - p).abs().sort(dim=0, descending=True)
    return (errors * _steps(truth.gather(0, order))).sum(0).mean()


def _steps(truth: Tensor) -> Tensor:
    """By how much each next wrong pixel raises J: g (n, k), of classes (n, k) of 0 and 1 sorted by falling error."""
    # Counts of pixels: beyond 2^24 of them fp32 would no longer tell neighbours apart, and 16 bits long before.
    wide = truth.to(torch.float64 if truth.dtype == torch.float64 or len(truth) >= 1 << 24 else torch.float32)
    right = wide.sum(0)
    jaccard = 1 - (right - wide.cumsum(0)) / (right + (1 - wide).cumsum(0))
    jaccard[1:] = jaccard[1:] - jaccard[:-1]
    return jaccard.to(truth.dtype)
