"""A linear layer whose weights are codes on a grid, 4 bits each (int4.py) or 8 (int8.py).

    y = x Wᵀ + bias,    w = scale · code + offset

The storage (tiles.py) tells the bits, and follows a move but never a cast.

Shapes: x (..., in); of 4 bits tiles (out / 16, in / 2, 16) uint8, of 8 (out / 16, in / 2, 16, 2) int8; steps
(out / 16, in / group, 1 or 2, 16) fp16, 1 where there are no offsets; result (..., out).
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.position.encoding import moved
from volvelle.parts.quantization.grid import GROUP, Grid, dequantize_weight, quantize_weight
from volvelle.parts.quantization.tiles import pack, pack_steps, stored, unpack, unpack_steps


@export("functional.quantized_linear")
def quantized_linear(x: Tensor, tiles: Tensor, steps: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + bias for a matrix of 4 or 8 bits, dequantised in fp32 and rounded once to x's dtype.

    x (..., in) of any floating dtype; tiles and steps as `tiles.pack` and `tiles.pack_steps` store codes, scales and
    offsets. Differentiable with respect to x and bias. Raises ValueError when the shapes do not fit.

    >>> codes, scale, offset = quantize_weight(torch.arange(32.0).view(16, 2), 4, group=2)
    >>> quantized_linear(torch.tensor([1.0, 0.0]), pack(codes, 4), pack_steps(scale, offset))[:3]
    tensor([0., 2., 4.])
    """
    weight = stored("quantized_linear", x, tiles, steps)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


class WeightOnlyLinear(nn.Module):
    """A linear layer whose matrix lies on a grid; the bias, if any, is a plain tensor. It does not train.

    `tiles` and `steps` (tiles.py) are buffers: `.to(device)` moves them, `.to(dtype)` leaves them as they are.
    """

    bits: ClassVar[int]
    tiles: Tensor
    steps: Tensor
    bias: Tensor | None

    def __init__(self, grid: Grid, bias: Tensor | None = None):
        """Hold a grid whose codes fit into `bits`; its outputs must be a multiple of 16."""
        super().__init__()
        self.out_features, self.in_features = grid.codes.shape
        self.register_buffer("tiles", pack(grid.codes, self.bits))
        self.register_buffer("steps", pack_steps(grid.scale, grid.offset))
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_linear(cls, linear: nn.Linear, group: int = GROUP) -> Self:
        """Round the weights of a layer to the nearest points of a grid (lossy)."""
        return cls(quantize_weight(linear.weight, cls.bits, group), linear.bias)

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.in_features // self.steps.shape[1]

    @property
    def grid(self) -> Grid:
        """The grid, unpacked."""
        return Grid(unpack(self.tiles), *unpack_steps(self.steps))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix (out, in) in `dtype`, made anew."""
        return dequantize_weight(*self.grid, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        return quantized_linear(x, self.tiles, self.steps, self.bias)

    def _apply(self, fn, recurse: bool = True):
        # A cast would round the scales, and a grid with other scales is another matrix.
        for name, held in self._buffers.items():
            if held is not None:
                self._buffers[name] = fn(held) if name == "bias" else moved(held, fn)
        return self

    def extra_repr(self) -> str:
        """The numbers shown by print(model)."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}"
