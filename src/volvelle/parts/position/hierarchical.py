"""Learned positions beyond the trained length: a position is written in two digits (Su 2020, kexue.fm/archives/7947).

With trained vectors p_0 .. p_{n-1} and a basis u, position m = i n + j gets
    q_m = α u_i + (1 - α) u_j,    u_i = (p_i - α p_0) / (1 - α)
so that q_j = p_j for j < n, and n trained vectors serve n² positions. α = 0.5 would give (i, j) and (j, i) one vector.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from volvelle.export import export
from volvelle.parts.position.learned import LearnedPositions


@export("functional.hierarchical_positions")
def hierarchical_positions(positions: Tensor, weight: Tensor, *, alpha: float = 0.4) -> Tensor:
    """Return q_m = α u_i + (1 - α) u_j for each position m = i n + j, with u_i = (p_i - α p_0) / (1 - α).

    positions are integers (n,) or (b, n), weight is (length, dim), trained as `learned_positions`; the result is
    (n, dim) or (b, n, dim), in the dtype of the weight. Below `length` it is the trained vector, exactly.
    Raises ValueError on a position outside 0 .. length² - 1, or on α that is not in (0, 1) or is 0.5.
    Su 2020, "hierarchical decomposition of position encodings", kexue.fm/archives/7947.

    >>> p = torch.tensor([[0.0], [1.0], [4.0]])
    >>> hierarchical_positions(torch.tensor([1, 2, 3, 8]), p, alpha=0.25).flatten()
    tensor([1.0000, 4.0000, 0.3333, 5.3333])
    """
    length = weight.shape[0]
    if not 0 < alpha < 1 or alpha == 0.5:
        raise ValueError(f"hierarchical_positions: alpha must be in (0, 1) and not 0.5, got {alpha}")
    if not torch.compiler.is_compiling() and positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= length**2:
            raise ValueError(
                f"hierarchical_positions: {length} trained positions reach from 0 to {length**2 - 1}, "
                f"got position {low if low < 0 else high}"
            )
    i, j = positions // length, positions % length
    p_i, p_j = functional.embedding(i, weight), functional.embedding(j, weight)
    # α u_i + (1 - α) u_j = p_j + α / (1 - α) (p_i - p_0): exact where i = 0
    return p_j + (p_i - weight[0]) * (alpha / (1 - alpha))


@export("nn.HierarchicalPositions", twin=hierarchical_positions)
class HierarchicalPositions(LearnedPositions):
    """`LearnedPositions` that reach length² positions; the same weight, so a trained one loads as it is.

    >>> HierarchicalPositions(16, 8).embed(torch.zeros(1, 3, 8), torch.tensor([0, 15, 200])).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, length: int, dim: int, *, alpha: float = 0.4) -> None:
        super().__init__(length, dim)
        self.alpha = alpha

    def forward(self, positions: Tensor) -> Tensor:
        """Return the vectors of these positions, (n, dim) or (b, n, dim)."""
        return hierarchical_positions(positions, self.weight, alpha=self.alpha)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{super().extra_repr()}, alpha={self.alpha}"
