"""Learned absolute positions: one trained vector a position, added to the embeddings (Gehring et al. 2017; GPT-2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from volvelle.export import export
from volvelle.parts.position.encoding import PositionEncoding


@export("functional.learned_positions")
def learned_positions(positions: Tensor, weight: Tensor) -> Tensor:
    """Return weight[m] for each position m.

    positions are integers (n,) or (b, n), weight is (length, dim); the result is (n, dim) or (b, n, dim), in the dtype
    of the weight. Raises ValueError on a position outside 0 .. length - 1, for nothing was trained there.
    Gehring et al. 2017, "Convolutional sequence to sequence learning", section 3.1.

    >>> learned_positions(torch.tensor([2, 0]), torch.tensor([[0.0], [1.0], [2.0]]))
    tensor([[2.],
            [0.]])
    """
    if not torch.compiler.is_compiling() and positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"learned_positions: {weight.shape[0]} positions were trained (0 to {weight.shape[0] - 1}), "
                f"got position {low if low < 0 else high}"
            )
    return functional.embedding(positions, weight)


@export("nn.LearnedPositions", twin=learned_positions)
class LearnedPositions(PositionEncoding):
    """`learned_positions` with its weight (length, dim); `embed` adds them to the token embeddings.

    >>> LearnedPositions(16, 8).embed(torch.zeros(1, 3, 8), torch.arange(3)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 0.02), as GPT-2 does."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, positions: Tensor) -> Tensor:
        """Return the vectors of these positions, (n, dim) or (b, n, dim)."""
        return learned_positions(positions, self.weight)

    def embed(self, x: Tensor, positions: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return x (b, n, dim) plus the vectors of its positions."""
        return x + self(positions)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"length={self.weight.shape[0]}, dim={self.weight.shape[1]}"
