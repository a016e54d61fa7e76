"""The order in which codes are stored: two neighbours along the inputs, for sixteen outputs side by side.

It is the order in which a register, or a tile of a matrix unit, takes pairs of bf16: unpacking 16 bytes fills one.
`tiles[o, p, r]` holds the codes of output 16 o + r and inputs 2 p and 2 p + 1: in the low and the high half of a byte
for 4 bits, in two bytes for 8.

The scales, and the offsets beside them, lie in the same order, so that a product reads all of it from front to back:
`steps[o, q, 0, r]` is the scale and `steps[o, q, 1, r]` the offset of output 16 o + r and group q.

Shapes: codes (out, in), scale and offset (in / group, out); tiles (out / 16, in / 2, 16) uint8 for 4 bits,
(out / 16, in / 2, 16, 2) int8 for 8; steps (out / 16, in / group, 1 or 2, 16), 1 where there are no offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from volvelle.parts.quantization.grid import Grid, dequantize_weight

OUTPUTS = 16


def pack(codes: Tensor, bits: int) -> Tensor:
    """Put codes (out, in) into the order of storage; out a multiple of 16, in of 2.

    >>> pack(torch.arange(32, dtype=torch.uint8).view(16, 2) % 16, 4)[0, 0, :3].tolist()  # 0 | 1 << 4, 2 | 3 << 4, …
    [16, 50, 84]
    """
    out, features = codes.shape
    if out % OUTPUTS or features % 2:
        raise ValueError(f"pack: codes must be (out, in) with out a multiple of 16 and in even, got {(out, features)}")
    pairs = codes.view(out // OUTPUTS, OUTPUTS, features // 2, 2).transpose(1, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).contiguous() if bits == 4 else pairs.contiguous()


def unpack(tiles: Tensor) -> Tensor:
    """Return the codes (out, in) that `pack` stored.

    >>> codes = torch.randint(-127, 128, (32, 6), dtype=torch.int8)
    >>> torch.equal(unpack(pack(codes, 8)), codes)
    True
    """
    pairs = torch.stack((tiles & 15, tiles >> 4), -1) if tiles.dim() == 3 else tiles
    return pairs.transpose(1, 2).reshape(pairs.shape[0] * OUTPUTS, pairs.shape[1] * 2)


def pack_steps(scale: Tensor, offset: Tensor | None) -> Tensor:
    """Put scale and offset (in / group, out) into the order of storage.

    >>> pack_steps(torch.ones(3, 32), torch.zeros(3, 32)).shape
    torch.Size([2, 3, 2, 16])
    """
    numbers = torch.stack((scale,) if offset is None else (scale, offset), 1)  # (groups, 1 or 2, out)
    return numbers.unflatten(2, (-1, OUTPUTS)).permute(2, 0, 1, 3).contiguous()


def unpack_steps(steps: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the scale and the offset that `pack_steps` stored."""
    numbers = steps.permute(1, 2, 0, 3).flatten(2)
    return numbers[:, 0], numbers[:, 1] if numbers.shape[1] > 1 else None


def stored(call: str, x: Tensor, tiles: Tensor, steps: Tensor) -> Tensor:
    """The matrix (out, in) of tiles and steps in the dtype of x, computed in fp32 (fp64 for fp64) and rounded once.

    Raises ValueError, in the name of `call`, where they do not fit x.
    """
    fits = tiles.dim() in {3, 4} and steps.dim() == 4 and tiles.shape[2] == steps.shape[3] == OUTPUTS
    if not fits or x.shape[-1] != 2 * tiles.shape[1] or len(steps) != len(tiles) or x.shape[-1] % steps.shape[1]:
        raise ValueError(
            f"{call}: for x of shape {tuple(x.shape)} tiles must be (out / 16, in / 2, 16) and steps "
            f"(out / 16, in / group, 1 or 2, 16), got {tuple(tiles.shape)} and {tuple(steps.shape)}"
        )
    return dequantize_weight(*Grid(unpack(tiles), *unpack_steps(steps)), x.dtype)
