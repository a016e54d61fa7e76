"""Complex-valued positions (Wang et al. 2020, "Encoding word order in complex embeddings", section 2).

Word j at position pos is the complex vector
    f(j, pos) = r_j e^{i (ω_j pos + θ_j)}
with an amplitude r_j, a frequency ω_j and an initial phase θ_j a feature: the meaning is the amplitude, the order the
phase. It is the general form with two properties: f(j, pos + n) follows from f(j, pos) by a factor e^{iω_j n} that does
not depend on pos, and |f| is bounded.

Here one real vector of width 2D holds D complex numbers, real parts first; an embedding z = r e^{iθ} already holds r
and θ, so the position only turns it: z e^{iω pos}. Shared by all words, ω makes this RoPE applied once, to embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from volvelle.export import export
from volvelle.parts.position.encoding import PositionEncoding
from volvelle.parts.position.rope_scaling import plain_frequencies


@export("functional.complex_positions")
def complex_positions(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Return z e^{iω pos} for the complex numbers z = r e^{iθ} in x.

    x is (b, n, 2D), real parts first, then imaginary ones; positions are integers (n,) or (b, n); frequencies ω, in
    radians a token, broadcast to (b, n, D): (D,) shared by all words, or (b, n, D), those of each word. The result is
    (b, n, 2D) in the dtype of x; angles are fp64. Raises ValueError on an odd width or frequencies of another width.
    Wang et al. 2020, section 2.

    >>> z = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])  # 1 + 0i, twice
    >>> complex_positions(z, torch.arange(2), torch.tensor([torch.pi / 2])).round(decimals=4)
    tensor([[[1., 0.],
             [-0., 1.]]])
    """
    if x.shape[-1] % 2 or frequencies.shape[-1] * 2 != x.shape[-1]:
        raise ValueError(
            f"complex_positions: x (b, n, 2D) and frequencies (..., D) must agree, got x of shape {tuple(x.shape)} "
            f"and frequencies of shape {tuple(frequencies.shape)}"
        )
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # mps has no fp64
    angle = positions.unsqueeze(-1) * frequencies.to(wide)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    real, imaginary = x.chunk(2, dim=-1)
    return torch.cat((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)


@export("nn.ComplexPositions", twin=complex_positions)
class ComplexPositions(PositionEncoding):
    """`complex_positions` with trained frequencies: (vocabulary, D), each word its own, or (D,) shared by all words.

    They start as the sinusoidal ones, base^(-i/D), for every word. `embed` needs the ids where words have their own.

    >>> module = ComplexPositions(8, vocabulary=100)
    >>> ids = torch.tensor([[5, 7, 5]])
    >>> module.embed(torch.randn(1, 3, 8), torch.arange(3), ids).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, dim: int, *, vocabulary: int | None = None, base: float = 10000.0) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"ComplexPositions: dim must be even and positive, got {dim}")
        self.base, self.vocabulary = base, vocabulary
        self.weight = nn.Parameter(torch.empty(dim // 2 if vocabulary is None else (vocabulary, dim // 2)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with the sinusoidal frequencies."""
        with torch.no_grad():
            self.weight.copy_(plain_frequencies(2 * self.weight.shape[-1], self.base))

    def frequencies(self, ids: Tensor | None = None) -> Tensor:
        """Return ω of the words (b, n, D), or (D,) where all words share them."""
        if self.vocabulary is None:
            return self.weight
        if ids is None:
            raise ValueError("ComplexPositions: each word has its own frequencies, so embed needs the ids")
        return functional.embedding(ids, self.weight)

    def forward(self, x: Tensor, positions: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return x (b, n, dim), turned by position."""
        return complex_positions(x, positions, self.frequencies(ids))

    def embed(self, x: Tensor, positions: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return x (b, n, dim), turned by position."""
        return self(x, positions, ids)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"dim={2 * self.weight.shape[-1]}, vocabulary={self.vocabulary}"
