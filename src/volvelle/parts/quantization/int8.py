"""A linear layer with weights of 8 bits: 1.06 bytes a weight with the scale of each 32.

    y = x Wᵀ + bias,    w = scale · code,    code in -127 … 127

Dettmers et al. 2022, "LLM.int8()", section 2, with the scale of a block of inputs in place of a whole row's; the grid
is llama.cpp's Q8_0. Activations stay as they are: what is lost is lost in the weights only.

Shapes: x (..., in), tiles (out / 16, in / 2, 16, 2) int8, steps (out / 16, in / group, 1, 16) fp16, result (..., out).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from volvelle.export import export
from volvelle.parts.quantization.tiles import stored
from volvelle.parts.quantization.weight_only import WeightOnlyLinear


@export("functional.int8_linear")
def int8_linear(x: Tensor, tiles: Tensor, steps: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + bias for a matrix of 8 bits, dequantised in fp32 and rounded once to x's dtype.

    x (..., in) of any floating dtype; tiles (out / 16, in / 2, 16, 2) int8 and steps (out / 16, in / group, 1, 16) as
    `tiles.pack` and `tiles.pack_steps` store codes and scales. Differentiable with respect to x and bias. Raises
    ValueError when the shapes do not fit.

    >>> import torch
    >>> from volvelle.parts.quantization.grid import quantize_weight
    >>> from volvelle.parts.quantization.tiles import pack, pack_steps
    >>> codes, scale, offset = quantize_weight(torch.eye(16), 8, group=16)
    >>> int8_linear(torch.arange(16.0), pack(codes, 8), pack_steps(scale, offset))[5]
    tensor(4.9997)
    """
    weight = stored("int8_linear", x, tiles, steps)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


@export("nn.Int8Linear", twin=int8_linear)
class Int8Linear(WeightOnlyLinear):
    """A linear layer with weights of 8 bits; from a `Grid`, or lossily with `from_linear`.

    >>> from torch import nn
    >>> layer = Int8Linear.from_linear(nn.Linear(64, 16))
    >>> layer, layer.tiles.nbytes
    (Int8Linear(64, 16, bits=8, group=32), 1024)
    """

    bits = 8

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        return int8_linear(x, self.tiles, self.steps, self.bias)
