"""Multiplicative positions: the embedding is multiplied by a trained vector of its position, not added to it.

    x'_m = x_m ⊙ p_m
listed as its own form in Su 2021, "Transformer position encodings that taxed researchers" (kexue.fm/archives/8130,
section "multiplicative").
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.position.encoding import PositionEncoding
from volvelle.parts.position.learned import learned_positions


@export("functional.multiplicative_positions")
def multiplicative_positions(x: Tensor, positions: Tensor, weight: Tensor) -> Tensor:
    """Return x_m ⊙ p_m, p_m = weight[m].

    x is (b, n, dim), positions are integers (n,) or (b, n), weight is (length, dim); the result is (b, n, dim). Raises
    ValueError on a position outside 0 .. length - 1. Su 2021, kexue.fm/archives/8130, "multiplicative".

    >>> multiplicative_positions(torch.ones(1, 2, 1), torch.tensor([2, 0]), torch.tensor([[1.0], [2.0], [3.0]]))
    tensor([[[3.],
             [1.]]])
    """
    return x * learned_positions(positions, weight)


@export("nn.MultiplicativePositions", twin=multiplicative_positions)
class MultiplicativePositions(PositionEncoding):
    """`multiplicative_positions` with its weight (length, dim), which starts near one: x passes at first.

    >>> x = torch.randn(1, 3, 8)
    >>> module = MultiplicativePositions(16, 8)
    >>> torch.equal(module.embed(x, torch.arange(3)), x * module.weight[:3])
    True
    """

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(1, 0.02)."""
        nn.init.normal_(self.weight, mean=1.0, std=0.02)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return x (b, n, dim) times the vectors of its positions."""
        return multiplicative_positions(x, positions, self.weight)

    def embed(self, x: Tensor, positions: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return x (b, n, dim) times the vectors of its positions."""
        return self(x, positions)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"length={self.weight.shape[0]}, dim={self.weight.shape[1]}"
