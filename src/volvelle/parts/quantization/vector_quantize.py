"""Vector quantization: van den Oord et al. 2017, "Neural Discrete Representation Learning", section 3.

Every vector becomes its nearest code, z_q = e_k with k = argmin_j |z - e_j|², and gradients pass straight through to z.
The loss moves codes to vectors and vectors to codes,

    L = a |sg[z] - e_k|² + b |z - sg[e_k]|²       (sg: no gradient; means over all numbers)

| convention | codebook_weight a | commitment b |
|---|---|---|
| the paper, equation 3 | 1 | β = 0.25 |
| "legacy": taming-transformers and diffusers unless told otherwise, where β fell on the other term | β | 1 |
| codes that are running means of their vectors (ema.py) | 0 | β |

Shapes: z of any shape with d numbers along `dim`, codebook (K, d), codes int64 of z's shape without `dim`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from volvelle.export import export
from volvelle.parts.quantization.nearest import nearest_code


class Quantized(NamedTuple):
    """The codes' vectors in z's shape and format, the codes' numbers, and the loss, a scalar of at least fp32."""

    quantized: Tensor
    codes: Tensor
    loss: Tensor


@export("functional.vector_quantize", stable=True)
def vector_quantize(
    z: Tensor,
    codebook: Tensor,
    *,
    dim: int = -1,
    commitment: float = 0.25,
    codebook_weight: float = 1.0,
) -> Quantized:
    """Replace every vector by its nearest code; gradients of the result go to z as they are, those of the loss to both.

    z holds vectors of d numbers along `dim` (1 for images (b, d, y, x)), codebook is (K, d). The result is exactly the
    codes' vectors, in z's format. The table above says what `commitment` and `codebook_weight` are in each convention.
    Nearest codes are those of `nearest_code`. Raises ValueError where widths differ.

    >>> z = torch.tensor([[0.8, 0.0]], requires_grad=True)
    >>> quantized, codes, loss = vector_quantize(z, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    >>> quantized.tolist(), codes.tolist(), round(float(loss), 6)
    ([[1.0, 0.0]], [1], 0.025)
    """
    if codebook.ndim != 2 or not z.ndim or z.shape[dim] != codebook.shape[1]:
        raise ValueError(
            f"vector_quantize: codebook must be (K, d) and z hold d numbers along dim={dim}, got z {tuple(z.shape)} "
            f"and codebook {tuple(codebook.shape)}"
        )
    vectors = z.movedim(dim, -1)
    codes = nearest_code(vectors, codebook)
    chosen = F.embedding(codes, codebook)
    # Squares of small differences in 16 bits would round to nothing.
    wide = torch.promote_types(torch.promote_types(z.dtype, codebook.dtype), torch.float32)
    ours, theirs = vectors.to(wide), chosen.to(wide)
    with torch.autocast(z.device.type, enabled=False):
        loss = commitment * F.mse_loss(ours, theirs.detach())
        if codebook_weight:
            loss = loss + codebook_weight * F.mse_loss(theirs, ours.detach())
    through = chosen.detach().to(z.dtype) + (vectors - vectors.detach())  # the codes' vectors to the last bit
    return Quantized(through.movedim(-1, dim), codes, loss)


class Quantizer(nn.Module):
    """What Modules with a codebook share: `embedding.weight` (codes, width), for vectors along `dim`."""

    embedding: Any
    """What holds the weight; each kind brings its own."""
    numbers: tuple[str, ...] = ("commitment",)
    """Arguments that print(model) shows."""

    def __init__(self, codes: int, width: int, *, dim: int, commitment: float):
        super().__init__()
        if codes < 1 or width < 1:
            raise ValueError(f"{type(self).__name__}: codes and width must be at least 1, got {codes} and {width}")
        self.dim, self.commitment = dim, commitment

    def look_up(self, codes: Tensor) -> Tensor:
        """The vectors of codes, with the `width` numbers along `dim`. Raises IndexError for what is no code."""
        return F.embedding(codes, self.embedding.weight).movedim(-1, self.dim)

    def extra_repr(self) -> str:
        """The numbers shown by print(model)."""
        codes, width = self.embedding.weight.shape
        return f"codes={codes}, width={width}, " + ", ".join(f"{name}={getattr(self, name):g}" for name in self.numbers)


@export("nn.VectorQuantizer", twin=vector_quantize, stable=True)
class VectorQuantizer(Quantizer):
    """A codebook of `codes` vectors of `width` numbers that learns by its loss; forward gives `Quantized`.

    The weights are `embedding.weight` (codes, width), which begin uniform in ±1 / codes, as in taming-transformers.
    The other arguments are those of `vector_quantize`; `dim` is 1 by default, for images (b, width, y, x).

    >>> quantizer = VectorQuantizer(16, 4)
    >>> quantizer(torch.randn(2, 4, 3, 5)).codes.shape, quantizer.look_up(torch.tensor([[3, 1]])).shape
    (torch.Size([2, 3, 5]), torch.Size([1, 4, 2]))
    """

    embedding: nn.Embedding
    numbers = ("commitment", "codebook_weight")

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        dim: int = 1,
        commitment: float = 0.25,
        codebook_weight: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__(codes, width, dim=dim, commitment=commitment)
        self.codebook_weight = codebook_weight
        self.embedding = nn.Embedding(codes, width, dtype=dtype, device=device)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize z, with `width` numbers along `dim`."""
        return vector_quantize(
            z,
            self.embedding.weight,
            dim=self.dim,
            commitment=self.commitment,
            codebook_weight=self.codebook_weight,
        )

    @torch.no_grad()
    def start_from(self, vectors: Tensor) -> None:
        """Take over (codes, width) vectors as the codes."""
        self.embedding.weight.copy_(vectors)
