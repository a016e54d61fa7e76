"""Sliced Wasserstein distance: the mean over directions of the distance on a line. Rabin et al. 2012, "Wasserstein
Barycenter and Its Application to Texture Mixing", equation 6; Bonneel et al. 2015.

    SW_p(P, Q)^p = E_θ W_p^p(θ·x, θ·y),      θ uniform on the unit sphere

A sort for each direction, where exact transport solves a linear program.
"""

from __future__ import annotations

import torch
from torch import Tensor

from volvelle.export import export
from volvelle.parts.transport.wasserstein_1d import wasserstein_1d


@export("functional.sliced_wasserstein")
def sliced_wasserstein(
    x: Tensor, y: Tensor, *, p: float = 2, directions: int = 64, generator: torch.Generator | None = None
) -> Tensor:
    """Return the sliced distance SW_p of points x (n, …) and y (m, …), with random directions; differentiable.

    fp16 and bf16 are computed in fp32. At x = y the gradient of the root is not defined: it is NaN for p > 1. Raises
    ValueError for shapes that do not fit and fewer than one direction.

    >>> x = torch.randn(100, 3)
    >>> float(sliced_wasserstein(x, x.flip(0))), bool(sliced_wasserstein(x, x + 1) > 0.5)
    (0.0, True)
    """
    if x.ndim < 2 or x.shape[1:] != y.shape[1:] or directions < 1:
        raise ValueError(
            "sliced_wasserstein: x and y must be points (n, …) and (m, …) of equal trailing shape and directions >= 1, "
            f"got {tuple(x.shape)}, {tuple(y.shape)} and {directions}"
        )
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    first, second = x.flatten(1).to(wide), y.flatten(1).to(wide)
    theta = torch.randn(first.shape[1], directions, generator=generator, dtype=wide, device=first.device)
    theta = theta / theta.norm(dim=0)
    found = wasserstein_1d(first @ theta, second @ theta, p=p).mean()
    return found if p == 1 else found ** (1 / p)
