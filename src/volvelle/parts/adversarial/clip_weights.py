"""Weight clipping, the first way to keep a critic's slopes bounded: Arjovsky et al. 2017, algorithm 1 ("Wasserstein
GAN", c = 0.01).

    w ← min(max(w, -c), c)       after each update of the critic

Every critic of a fixed shape with weights in a box is K-Lipschitz for one K, but nobody knows K, and most weights end
at ±c: what the critic estimates is K times a distance that is too small (Gulrajani et al. 2017, figure 1).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from volvelle.export import export


@export("functional.clip_weights")
@torch.no_grad()
def clip_weights(weights: Iterable[Tensor], bound: float) -> None:
    """Clamp tensors to [-bound, bound], in place. NaN stays NaN. Raises ValueError for a bound that is not above 0.

    Arjovsky et al. 2017, algorithm 1, line 7.

    >>> w = torch.tensor([-3.0, 0.005, 1.0])
    >>> clip_weights([w], 0.01)
    >>> w
    tensor([-0.0100,  0.0050,  0.0100])
    """
    if not bound > 0:
        raise ValueError(f"clip_weights: bound must be above 0, got {bound}")
    for w in weights:
        w.clamp_(-bound, bound)
