"""A weight matrix on a grid: integers of 4 or 8 bits, with a scale and an offset for each group of inputs of an output.

    w ≈ scale · code + offset

4 bits: codes 0 … 15 between the least and the greatest weight of a group (llama.cpp's Q4_1). 8 bits: codes -127 … 127,
no offset (Q8_0). Rounding weights to a grid loses what lies between its points; a matrix that already lies on one (a
GGUF file's) is taken over without any loss.

Weights of 4 bits after training: Dettmers & Zettlemoyer 2023, "The case for 4-bit precision", section 2.

Shapes: weight (out, in), codes (out, in), scale and offset (in / group, out), fp16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from volvelle.export import export

GROUP = 32
"""Inputs a group, where nothing else is said: that of GGUF files."""


class Grid(NamedTuple):
    """`codes` (out, in), uint8 for 4 bits and int8 for 8; `scale` and `offset` (in / group, out), offset None for 0."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // len(self.scale)


@export("functional.quantize_weight")
def quantize_weight(weight: Tensor, bits: int, group: int = GROUP) -> Grid:
    """Round a matrix to the nearest points of a grid: lossy, by half a step of each group at most.

    weight (out, in) of any floating dtype; `bits` 4 or 8; in must be a multiple of `group`. Scales and offsets are
    fp16, and the codes are the best ones for these. Raises ValueError otherwise, and for weights that are not finite.

    >>> grid = quantize_weight(torch.tensor([[0.0, 1.0, 2.0, 15.0]]), 4, group=4)
    >>> grid.codes, grid.scale, grid.offset
    (tensor([[ 0,  1,  2, 15]], dtype=torch.uint8), tensor([[1.]], dtype=torch.float16),
     tensor([[0.]], dtype=torch.float16))
    """
    if bits not in {4, 8}:
        raise ValueError(f"quantize_weight: bits must be 4 or 8, got {bits}")
    if weight.dim() != 2 or group < 1 or weight.shape[1] % group or not weight.is_floating_point():
        raise ValueError(
            f"quantize_weight: weight must be floating (out, in) with in a multiple of group={group}, "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    groups = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).unflatten(1, (-1, group))
    if not bool(torch.isfinite(groups).all()):
        raise ValueError("quantize_weight: the weight holds numbers that are not finite")
    low, high = groups.amin(-1), groups.amax(-1)  # (out, in / group)
    span = (high - low) / 15 if bits == 4 else torch.maximum(high, -low) / 127
    scale, offset = span.half(), low.half() if bits == 4 else None
    steps = scale.to(groups)[..., None]
    places = (groups if offset is None else groups - offset.to(groups)[..., None]) / torch.where(steps == 0, 1, steps)
    codes = places.round().clamp(0 if bits == 4 else -127, 15 if bits == 4 else 127)
    codes = torch.where(steps == 0, 0, codes).flatten(1).to(torch.uint8 if bits == 4 else torch.int8)
    return Grid(codes, scale.t().contiguous(), None if offset is None else offset.t().contiguous())


@export("functional.dequantize_weight")
def dequantize_weight(codes: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return scale · code + offset, (out, in): computed in fp32 (fp64 for fp64), rounded once to `dtype`.

    codes (out, in); scale and offset (in / group, out). Raises ValueError when they do not fit.

    >>> dequantize_weight(torch.tensor([[0, 3]]), torch.tensor([[2.0]]), torch.tensor([[-1.0]]), torch.float32)
    tensor([[-1.,  5.]])
    """
    out, features = codes.shape
    fits = scale.dim() == 2 and scale.shape[1] == out and len(scale) and features % len(scale) == 0
    if not fits or (offset is not None and offset.shape != scale.shape):
        shapes = tuple(scale.shape), None if offset is None else tuple(offset.shape)
        raise ValueError(
            f"dequantize_weight: scale and offset must be (in / group, out) for codes of {(out, features)}, "
            f"got {shapes}"
        )
    wide = torch.promote_types(dtype, torch.float32)
    # (out, in / group, group)
    values = codes.unflatten(1, (len(scale), -1)).to(wide) * scale.t().to(wide)[..., None]
    if offset is not None:
        values += offset.t().to(wide)[..., None]
    return values.flatten(1).to(dtype)
