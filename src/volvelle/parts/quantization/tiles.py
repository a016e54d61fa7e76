"""The order in which codes are stored: two neighbours along the inputs, for sixteen outputs side by side.

It is the order in which a register, or a tile of a matrix unit, takes pairs of bf16: unpacking 16 bytes fills one.
`tiles[o, p, r]` holds the codes of output 16 o + r and inputs 2 p and 2 p + 1: in the low and the high half of a byte
for 4 bits, in two bytes for 8.

Shapes: codes (out, in); tiles (out / 16, in / 2, 16) uint8 for 4 bits, (out / 16, in / 2, 16, 2) int8 for 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
