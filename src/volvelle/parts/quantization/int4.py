"""A linear layer with weights of 4 bits: 0.625 bytes a weight with the scale and offset of each 32.

    y = x Wᵀ + bias,    w = scale · code + offset,    code in 0 … 15

A step of decoding reads every weight once, so its time is the bytes of the weights: a quarter to a third of bf16's.
Frantar et al. 2023, "GPTQ", section 5 (kernels that read 4 bits and compute in 16); the grid is llama.cpp's Q4_1.

Shapes: x (..., in), tiles (out / 16, in / 2, 16) uint8, steps (out / 16, in / group, 2, 16) fp16, result (..., out).
"""

from __future__ import annotations

from volvelle.export import export
from volvelle.parts.quantization.weight_only import WeightOnlyLinear, quantized_linear


@export("nn.Int4Linear", twin=quantized_linear)
class Int4Linear(WeightOnlyLinear):
    """A linear layer with weights of 4 bits; from a `Grid`, or lossily with `from_linear`.

    >>> from torch import nn
    >>> layer = Int4Linear.from_linear(nn.Linear(64, 16))
    >>> layer, layer.tiles.nbytes
    (Int4Linear(64, 16, bits=4, group=32), 512)
    """

    bits = 4
