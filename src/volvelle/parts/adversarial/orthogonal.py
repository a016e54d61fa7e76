"""Linear layers with orthonormal rows or columns: 1-Lipschitz by construction, without losing slope.

Björck & Bowie 1971, as Anil, Lucas & Grosse 2019 use it ("Sorting out Lipschitz Function Approximation", section 4.2.1
and appendix): from W scaled to a spectral norm of at most 1,

    W ← W (3/2 I - 1/2 Wᵀ W)

Each singular value follows σ ← 3/2 σ - 1/2 σ³, which maps [0, 1] into itself and everything above 0 towards 1. So the
layer is 1-Lipschitz after any number of rounds, up to rounding; more rounds only make it closer to orthonormal. The
scale is a bound that needs no eigenvalues and is at most n^(1/4) too large, ‖W‖₂ <= ‖W Wᵀ‖_F^(1/2); the first rounds,
which multiply small values by 3/2, make up for that.

Shapes: W (out, in), x (…, in).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.export import export


@export("functional.orthonormalize")
def orthonormalize(weight: Tensor, rounds: int = 12) -> Tensor:
    """Return the matrix with orthonormal rows (or columns, whichever are fewer) nearest to `weight`, by Björck rounds.

    weight (n, m), of full rank; the result has singular values in [0, 1], those of a well-conditioned weight at 1
    within rounding. Differentiable, also twice. fp16 and bf16 are computed in fp32. A zero matrix stays zero. Anil et
    al. 2019, section 4.2.1. Raises ValueError for what is no matrix, and for rounds below 0.

    >>> q = orthonormalize(torch.tensor([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0]]))
    >>> (q @ q.T).round(decimals=4)
    tensor([[1., 0.],
            [0., 1.]])
    """
    if weight.ndim != 2 or rounds < 0:
        raise ValueError(
            f"orthonormalize: wanted a matrix and rounds >= 0, got {tuple(weight.shape)} and rounds {rounds}"
        )
    with torch.autocast(weight.device.type, enabled=False):
        w = weight.to(torch.promote_types(weight.dtype, torch.float32))
        wide = w.shape[0] <= w.shape[1]
        w = w if wide else w.T  # the smaller product costs less
        # A constant in the graph: the result hardly depends on the scale.
        w = w / _scale(w.detach())
        for _ in range(rounds):
            w = 1.5 * w - 0.5 * (w @ w.T) @ w
        return (w if wide else w.T).to(weight.dtype)


def _scale(w: Tensor) -> Tensor:
    """A number that is at least the largest singular value of w (n, m), and 1 for zeros."""
    largest = w.abs().amax() if w.numel() else w.new_zeros(())
    # The entries are brought to 1 first, so that their fourth powers neither over- nor underflow.
    whole = torch.where(largest > 0, largest, 1.0)
    unit = w / whole
    bound = torch.linalg.matrix_norm(unit @ unit.T).sqrt() * (1 + 1e-6)
    return whole * torch.where(largest > 0, bound, 1.0)


@export("functional.orthogonal_linear")
def orthogonal_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, rounds: int = 12) -> Tensor:
    """Return x Qᵀ + bias with Q = orthonormalize(weight): a linear map that lengthens nothing.

    x (…, in), weight (out, in), bias (out). Where out >= in distances are kept, else shortened. Anil et al. 2019.

    >>> x = torch.randn(5, 3)
    >>> y = orthogonal_linear(x, torch.eye(4, 3) + 0.1)
    >>> torch.allclose(y.norm(dim=1), x.norm(dim=1), atol=1e-4)
    True
    """
    return F.linear(x, orthonormalize(weight, rounds), bias)


@export("nn.OrthogonalLinear", twin=orthogonal_linear)
class OrthogonalLinear(nn.Module):
    """`orthogonal_linear` with its weight and bias, drawn orthonormal (Saxe et al. 2014).

    >>> layer = OrthogonalLinear(6, 4)
    >>> layer(torch.zeros(2, 6)).shape, layer.lipschitz() < 1 + 1e-5
    (torch.Size([2, 4]), True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        rounds: int = 12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.rounds = rounds
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight orthonormal and the bias as nn.Linear does."""
        nn.init.orthogonal_(self.weight)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight.shape[1])
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        return orthogonal_linear(x, self.weight, self.bias, rounds=self.rounds)

    @torch.no_grad()
    def lipschitz(self) -> float:
        """The layer's Lipschitz constant in the Euclidean norm: its matrix's largest singular value, in fp64."""
        return float(torch.linalg.matrix_norm(orthonormalize(self.weight, self.rounds).double(), 2))

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, rounds={self.rounds}"
