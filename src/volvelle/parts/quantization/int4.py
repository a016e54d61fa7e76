"""A linear layer with weights of 4 bits: 0.625 bytes a weight with the scale and offset of each 32.

    y = x Wᵀ + bias,    w = scale · code + offset,    code in 0 … 15

A step of decoding reads every weight once, so its time is the bytes of the weights: a quarter to a third of bf16's.
Frantar et al. 2023, "GPTQ", section 5 (kernels that read 4 bits and compute in 16); the grid is llama.cpp's Q4_1.

Shapes: x (..., in), tiles (out / 16, in / 2, 16) uint8, steps (out / 16, in / group, 2, 16) fp16, result (..., out).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from volvelle.export import export
from volvelle.parts.quantization.tiles import stored
from volvelle.parts.quantization.weight_only import WeightOnlyLinear


@export("functional.int4_linear")
def int4_linear(x: Tensor, tiles: Tensor, steps: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + bias for a matrix of 4 bits, dequantised in fp32 and rounded once to x's dtype.

    x (..., in) of any floating dtype; tiles (out / 16, in / 2, 16) uint8 and steps (out / 16, in / group, 2, 16) as
    `tiles.pack` and `tiles.pack_steps` store codes, scales and offsets. Differentiable with respect to x and bias.
    Raises ValueError when the shapes do not fit.

    >>> import torch
    >>> from volvelle.parts.quantization.grid import quantize_weight
    >>> from volvelle.parts.quantization.tiles import pack, pack_steps
    >>> codes, scale, offset = quantize_weight(torch.arange(32.0).view(16, 2), 4, group=2)
    >>> int4_linear(torch.tensor([1.0, 0.0]), pack(codes, 4), pack_steps(scale, offset))[:3]
    tensor([0., 2., 4.])
    """
    weight = stored("int4_linear", x, tiles, steps)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


@export("nn.Int4Linear", twin=int4_linear)
class Int4Linear(WeightOnlyLinear):
    """A linear layer with weights of 4 bits; from a `Grid`, or lossily with `from_linear`.

    >>> from torch import nn
    >>> layer = Int4Linear.from_linear(nn.Linear(64, 16))
    >>> layer, layer.tiles.nbytes
    (Int4Linear(64, 16, bits=4, group=32), 512)
    """

    bits = 4

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        return int4_linear(x, self.tiles, self.steps, self.bias)
