"""Sinusoidal positions (Vaswani et al. 2017, "Attention is all you need", section 3.5): sines and cosines added once.

PE(m, 2i) = sin(m θ_i),  PE(m, 2i + 1) = cos(m θ_i),  θ_i = base^(-2i/dim)
The dot product of two of them depends on their distance alone: Σ_i cos((m - n) θ_i).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from volvelle.export import export
from volvelle.parts.position.encoding import PositionEncoding
from volvelle.parts.position.rope_scaling import plain_frequencies


@export("functional.sinusoidal_positions", stable=True)
def sinusoidal_positions(
    positions: Tensor,
    dim: int,
    *,
    base: float = 10000.0,
    layout: Literal["interleaved", "half"] = "interleaved",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the position vectors: sin(m θ_i) and cos(m θ_i), θ_i = base^(-2i/dim).

    positions are integers (n,) or (b, n), the result is (n, dim) or (b, n, dim). Features alternate sine and cosine as
    in the paper, or with layout "half" hold all sines, then all cosines (as in RoFormer, BERT and BART checkpoints).
    Angles are fp64, cast to `dtype` last. Raises ValueError when dim is odd. Vaswani et al. 2017, section 3.5.

    >>> sinusoidal_positions(torch.arange(2), 4)
    tensor([[0.0000, 1.0000, 0.0000, 1.0000],
            [0.8415, 0.5403, 0.0100, 0.9999]])
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"sinusoidal_positions: dim must be even and positive, got {dim}")
    if layout not in {"interleaved", "half"}:
        raise ValueError(f"sinusoidal_positions: layout must be 'interleaved' or 'half', got {layout!r}")
    home = positions.device
    where = torch.device("cpu") if home.type == "mps" else home  # mps has no fp64
    angle = positions.to(where).unsqueeze(-1) * plain_frequencies(dim, base).to(where)
    if layout == "half":
        table = torch.cat((angle.sin(), angle.cos()), dim=-1)
    else:
        table = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)
    return table.to(home, dtype)


@export("nn.SinusoidalPositions", twin=sinusoidal_positions)
class SinusoidalPositions(PositionEncoding):
    """`sinusoidal_positions` with its options held; `embed` adds them to the token embeddings. No parameters.

    >>> x = torch.zeros(1, 3, 8)
    >>> torch.equal(SinusoidalPositions(8).embed(x, torch.arange(3))[0], sinusoidal_positions(torch.arange(3), 8))
    True
    """

    def __init__(
        self, dim: int, *, base: float = 10000.0, layout: Literal["interleaved", "half"] = "interleaved"
    ) -> None:
        super().__init__()
        self.dim, self.base = dim, base
        self.layout: Literal["interleaved", "half"] = layout

    def forward(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the vectors of these positions, (n, dim) or (b, n, dim)."""
        return sinusoidal_positions(positions, self.dim, base=self.base, layout=self.layout, dtype=dtype)

    def embed(self, x: Tensor, positions: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return x (b, n, dim) plus the vectors of its positions."""
        return x + self(positions, x.dtype)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, base={self.base:g}, layout={self.layout!r}"
