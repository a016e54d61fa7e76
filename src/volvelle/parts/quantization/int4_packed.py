"""torch's own kernel for weights of 4 bits on CPUs, with the grid as it is: for machines where nothing can be compiled.

The kernel computes w = scale · (code - 8) + zero in the dtype of x. In fp32 both numbers hold what a file has in fp16
(zero is offset + 8 scale); in 16 bits they would be rounded, so that x is computed in fp32.

It reads weights in an order of its own: this is a second copy, 0.75 bytes a weight with its grid in fp32, beside the
layer's 0.625.

Shapes: x (..., in), packed (out, in / 2), grid (in / group, out, 2), result (..., out).
"""

from __future__ import annotations

import torch
from torch import Tensor

from volvelle.parts.quantization.int4 import Int4Linear

FEW = 8
"""Rows up to which the kernel is used; a matrix dequantised once for all rows is faster above."""


class PackedInt4:
    """The matrix of an Int4Linear in the order of torch's kernel.

    >>> from torch import nn
    >>> layer = Int4Linear.from_linear(nn.Linear(64, 16))
    >>> x = torch.randn(2, 64)
    >>> torch.allclose(PackedInt4(layer)(x), layer(x), atol=1e-5)
    True
    """

    def __init__(self, layer: Int4Linear):
        codes, scale, offset = layer.grid
        scale = scale.float()
        zero = 8 * scale if offset is None else offset.float() + 8 * scale
        self.layer, self.grid = layer, torch.stack((scale, zero), -1).contiguous()
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Map x (..., in) of any dtype to (..., out)."""
        rows = x.reshape(-1, x.shape[-1]).float()
        if len(rows) > FEW:
            return self.layer(x)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.layer.group, self.grid)
        bias = self.layer.bias
        y = y if bias is None else y + bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)
