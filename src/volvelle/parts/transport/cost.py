"""The cost of moving mass from points to points, and which masses: what every distance of this folder begins with.

    M_ij = ‖x_i - y_j‖^p

Distances are computed from differences. The faster way by products, ‖x‖² + ‖y‖² - 2 x·y, which `torch.cdist` takes for
more than 25 points, loses what near neighbours differ by: it gives 0 for points that are apart.

Shapes: x (n, d), y (m, d), M (n, m); a (n) and b (m) are masses, of equal sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from volvelle.export import export


@export("functional.transport_cost")
def transport_cost(x: Tensor, y: Tensor, p: float = 1) -> Tensor:
    """Return ‖x_i - y_j‖^p with the Euclidean norm, for every pair of points, as (n, m).

    x (n, …) and y (m, …), of equal trailing shape, floating point; pictures are taken as vectors. fp16 and bf16 are
    computed in fp32. The gradient at distance 0 is 0. Raises ValueError for shapes that do not fit and for p <= 0.

    >>> transport_cost(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]]), p=2)
    tensor([[9.],
            [4.]])
    """
    if x.ndim < 2 or x.shape[1:] != y.shape[1:] or not p > 0:
        raise ValueError(
            f"transport_cost: x and y must be points (n, …) and (m, …) of equal trailing shape and p > 0, got "
            f"{tuple(x.shape)}, {tuple(y.shape)} and p {p}"
        )
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    first, second = x.flatten(1).to(wide), y.flatten(1).to(wide)
    found = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")
    return found if p == 1 else found**p


def masses(call: str, weights: Tensor | None, count: int, like: Tensor) -> Tensor:
    """The masses (count), summing to 1, of weights that are not negative; equal ones for None."""
    if weights is None:
        return torch.full((count,), 1 / max(count, 1), dtype=like.dtype, device=like.device)
    if weights.shape != (count,):
        raise ValueError(f"{call}: wanted {count} weights, one a point, got shape {tuple(weights.shape)}")
    total = weights.sum()
    if bool((weights < 0).any()) or not bool(total > 0) or not bool(torch.isfinite(total)):
        raise ValueError(f"{call}: weights must be finite, not negative, and not all zero")
    return weights.to(like.dtype) / total
