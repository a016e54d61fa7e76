"""A linear layer with weights of 8 bits: 1.06 bytes a weight with the scale of each 32.

    y = x Wᵀ + bias,    w = scale · code,    code in -127 … 127

Dettmers et al. 2022, "LLM.int8()", section 2, with the scale of a block of inputs in place of a whole row's; the grid
is llama.cpp's Q8_0. Activations stay as they are: what is lost is lost in the weights only.

Shapes: x (..., in), tiles (out / 16, in / 2, 16, 2) int8, steps (out / 16, in / group, 1, 16) fp16, result (..., out).
"""

from __future__ import annotations

from volvelle.export import export
from volvelle.parts.quantization.weight_only import WeightOnlyLinear, quantized_linear


@export("nn.Int8Linear", twin=quantized_linear)
class Int8Linear(WeightOnlyLinear):
    """A linear layer with weights of 8 bits; from a `Grid`, or lossily with `from_linear`.

    >>> from torch import nn
    >>> layer = Int8Linear.from_linear(nn.Linear(64, 16))
    >>> layer, layer.tiles.nbytes
    (Int8Linear(64, 16, bits=8, group=32), 1024)
    """

    bits = 8
