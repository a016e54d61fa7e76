"""What linear layers with quantised weights share: their storage, which follows a move and never a cast."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from volvelle.parts.position.encoding import moved
from volvelle.parts.quantization.grid import GROUP, Grid, dequantize_weight, quantize_weight
from volvelle.parts.quantization.tiles import pack, pack_steps, unpack, unpack_steps


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

    def _apply(self, fn, recurse: bool = True):
        # A cast would round the scales, and a grid with other scales is another matrix.
        for name, held in self._buffers.items():
            if held is not None:
                self._buffers[name] = fn(held) if name == "bias" else moved(held, fn)
        return self

    def extra_repr(self) -> str:
        """The numbers shown by print(model)."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}"
