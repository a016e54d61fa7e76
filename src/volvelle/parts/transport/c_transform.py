"""The c-transform, which makes a lower bound of any potential. Villani 2003, "Topics in Optimal Transportation",
section 1.1 (Kantorovich duality) and definition 2.33.

    φ^c(j) = min_i M_ij - φ(i),        Σ_i a_i φ(i) + Σ_j b_j φ^c(j) <= min_P ⟨P, M⟩

for any φ, since φ(i) + φ^c(j) <= M_ij for every pair, whatever φ is. φ^c is the largest such partner, and
φ^ccc = φ^c. For M a distance and φ 1-Lipschitz, φ^c = -φ: the dual that a WGAN's critic climbs.
"""

from __future__ import annotations

from torch import Tensor

from volvelle.export import export
from volvelle.parts.transport.cost import masses


@export("functional.c_transform")
def c_transform(potential: Tensor, M: Tensor) -> Tensor:
    """Return φ^c (m), the largest partner of a potential φ (n) under costs M (n, m). Villani 2003, definition 2.33.

    For the other side transpose the costs. Differentiable; batches (…, n) and (…, n, m) work. Raises ValueError for
    shapes that do not fit and no points.

    >>> import torch
    >>> c_transform(torch.tensor([0.0, 2.0]), torch.tensor([[1.0, 4.0], [2.0, 3.0]]))
    tensor([0., 1.])
    """
    if M.ndim < 2 or potential.shape != M.shape[:-1] or not M.shape[-2]:
        raise ValueError(
            f"c_transform: potential must be (…, n) and M (…, n, m) with n >= 1, got {tuple(potential.shape)} and "
            f"{tuple(M.shape)}"
        )
    return (M - potential[..., None]).amin(-2)


@export("functional.dual_bound")
def dual_bound(potential: Tensor, M: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """Return Σ a φ + Σ b φ^c, which no plan between masses a (n) and b (m) costs less than, for any potential φ (n).

    Any critic's scores may stand for φ. Masses are scaled to sum to 1 and equal when absent. Villani 2003, theorem 1.3.

    >>> import torch
    >>> dual_bound(torch.tensor([0.0, 2.0]), torch.tensor([[1.0, 4.0], [2.0, 3.0]]))
    tensor(1.5000)
    """
    partner = c_transform(potential, M)
    a, b = (masses("dual_bound", w, n, M) for w, n in zip((a, b), M.shape, strict=True))
    return a @ potential.to(M.dtype) + b @ partner
