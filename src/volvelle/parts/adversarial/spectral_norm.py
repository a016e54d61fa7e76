"""Spectral normalisation: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks", section 2.1
and algorithm 1.

    u ← W v / ‖W v‖,   v ← Wᵀ u / ‖Wᵀ u‖,   σ = uᵀ W v,   W_SN = W / σ

One round of power iteration an update is enough, since weights move slowly. Of a convolution W is the kernel as a
matrix (out, in k k), as in the paper; the norm of the convolution itself can be k times as large, so a stack of such
layers is bounded, but not 1-Lipschitz by construction (`orthogonal_linear` is).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.export import export


@export("functional.power_iteration")
@torch.no_grad()
def power_iteration(weight: Tensor, v: Tensor, rounds: int = 1) -> tuple[Tensor, Tensor]:
    """Return the unit vectors (u, v) after `rounds` of power iteration from v, towards the largest singular value.

    weight (out, …), taken as a matrix (out, rest); u (out), v (rest). Miyato et al. 2018, equations 18 and 19. Raises
    ValueError for a v of another length and fewer than one round.

    >>> u, v = power_iteration(torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([0.6, 0.8]), rounds=9)
    >>> v.round(decimals=3)
    tensor([1., 0.])
    """
    w = weight.detach().flatten(1)
    if v.shape != w.shape[1:] or rounds < 1:
        raise ValueError(
            f"power_iteration: wanted v of shape {tuple(w.shape[1:])} and rounds >= 1, got {tuple(v.shape)} and "
            f"rounds {rounds}"
        )
    u = w.new_zeros(len(w))
    for _ in range(rounds):
        u = F.normalize(w @ v, dim=0, eps=1e-12)
        v = F.normalize(w.T @ u, dim=0, eps=1e-12)
    return u, v


@export("functional.spectral_norm")
def spectral_norm(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return weight / σ with σ = uᵀ W v, whose gradient treats u and v as constants.

    weight (out, …), u (out) and v (rest) those of `power_iteration`. Miyato et al. 2018, equation 8 and section 2.3.

    >>> w = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> spectral_norm(w, torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))[0]
    tensor([1., 0.])
    """
    return weight / torch.dot(u, weight.flatten(1) @ v)


@export("nn.SpectralNorm", twin=spectral_norm)
class SpectralNorm(nn.Module):
    """`spectral_norm` as a parametrisation: each use in training takes `rounds` of power iteration, evaluation none.

    >>> from torch.nn.utils import parametrize
    >>> layer = nn.Conv2d(3, 8, 3)
    >>> _ = parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight))
    >>> float(torch.linalg.matrix_norm(layer.weight.flatten(1).detach(), 2)) < 1.05
    True
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, *, rounds: int = 1, start: int = 30):
        super().__init__()
        self.rounds = rounds
        matrix = weight.detach().flatten(1)
        u, v = power_iteration(matrix, F.normalize(torch.randn_like(matrix[0]), dim=0), start)
        self.register_buffer("u", u)
        self.register_buffer("v", v)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight over its largest singular value."""
        if self.training:
            u, v = power_iteration(weight, self.v, self.rounds)
            with torch.no_grad():
                self.u.copy_(u)
                self.v.copy_(v)
        # Copies, for the next use moves the buffers while the graph of this one may still be needed.
        return spectral_norm(weight, self.u.clone(), self.v.clone())
