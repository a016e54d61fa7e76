"""How much of a codebook is in use, from a histogram over a whole set: a batch is too small to tell.

A batch of 3,136 codes cannot show 16,384 of them; over an epoch they may all occur.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from volvelle.export import export


class Usage(NamedTuple):
    """`share` of the codes that occur at all; `perplexity` exp(-Σ p log p), how many equally frequent ones that is."""

    share: float
    perplexity: float


@export("functional.codebook_usage")
def codebook_usage(counts: Tensor) -> Usage:
    """Usage of a codebook by how often each of its codes occurred, counts (K).

    `torch.bincount(codes.flatten(), minlength=K)` gives them, added up over the batches of an epoch. Raises ValueError
    for counts that are not (K), negative, or all zero.

    >>> codebook_usage(torch.tensor([5, 5, 0, 0]))
    Usage(share=0.5, perplexity=2.0)
    """
    if counts.ndim != 1 or not len(counts) or bool((counts < 0).any()) or not bool(counts.any()):
        raise ValueError(f"codebook_usage: counts (K) with something counted are wanted, got {tuple(counts.shape)}")
    share = float((counts > 0).double().mean())
    p = counts.double() / counts.sum()
    return Usage(share, round(float(torch.special.entr(p).sum().exp()), 12))
