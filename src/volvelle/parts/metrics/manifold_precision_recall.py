"""Precision and recall of a generator: how much of what it makes looks real, and how much of what is real it can make.

Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models", equations 1 to 3. Each
set's manifold is estimated as the union of balls around its features, each as large as the distance to the k-th
neighbour in the set:

    precision = share of generated features inside the manifold of the real ones
    recall    = share of real features inside the manifold of the generated ones

A generator that repeats one good picture has precision 1 and recall near 0, which a single distance cannot tell. With
features of two thousand pictures or more the figures settle; they depend on what computes the features.

Shapes: features (n, d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from volvelle.export import export


@export("functional.manifold_precision_recall")
def manifold_precision_recall(real: Tensor, fake: Tensor, k: int = 3, *, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Return (precision, recall), numbers in [0, 1], of features real (n, d) and fake (m, d).

    Distances are exact, computed for `block` rows at a time. Raises ValueError for shapes that do not fit and sets of
    not more than k rows. Kynkäänniemi et al. 2019, section 2.

    >>> real = torch.arange(6.0)[:, None]
    >>> manifold_precision_recall(real, torch.full((6, 1), 2.5), k=1)
    (tensor(1.), tensor(0.))
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1] or min(len(real), len(fake)) <= k or k < 1:
        raise ValueError(
            "manifold_precision_recall: features must be (n, d) and (m, d) with n, m > k >= 1, got "
            f"{tuple(real.shape)}, {tuple(fake.shape)} and k {k}"
        )
    found = (_share_inside(fake, real, k, block), _share_inside(real, fake, k, block))
    return found


def _share_inside(points: Tensor, around: Tensor, k: int, block: int) -> Tensor:
    """The share of `points` that lie in a ball of `around`."""
    radii = torch.cat([_distances(part, around).kthvalue(k + 1, 1).values for part in around.split(block)])
    inside = [(_distances(part, around) <= radii).any(1) for part in points.split(block)]
    return torch.cat(inside).float().mean()


def _distances(x: Tensor, y: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.cdist(x.to(wide), y.to(wide), compute_mode="donot_use_mm_for_euclid_dist")
