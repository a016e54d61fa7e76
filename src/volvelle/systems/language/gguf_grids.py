"""A GGUF file's quantised tensors as grids, number for number: nothing is rounded on the way.

Blocks of 32 weights (llama.cpp's ggml-common.h): Q4_0 is d (fp16) and 16 bytes, w = d (code - 8); Q4_1 is d, m and 16
bytes, w = d code + m; Q8_0 is d and 32 signed bytes, w = d code. Byte j of a block of 4 bits holds weight j in its low
half and weight j + 16 in its high half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from volvelle.parts.quantization.grid import Grid
from volvelle.systems.language.gguf_families import change_rows

if TYPE_CHECKING:
    from volvelle.systems.language.gguf import GGUF

KINDS = ("Q4_0", "Q4_1", "Q8_0")
"""The types whose blocks are grids of 4 or 8 bits."""


def grid_of(file: GGUF, name: str) -> Grid | None:
    """The grid of a tensor given by its Hugging Face name; None where the file has none of these types for it.

    Rows are in the order of `file.tensors[name]`.
    """
    if name not in file.tensors:
        return None
    where = file.tensors.where(name)
    stored = file.blocks(name)
    if stored.kind not in KINDS or len(stored.shape) != 2 or where.change == "transpose":
        return None
    heads, kv_heads = file.tensors.heads
    blocks = np.array(stored.raw).reshape(stored.shape[0], stored.shape[1] // 32, -1)
    columns = 4 if stored.kind == "Q4_1" else 2
    numbers = torch.from_numpy(blocks[..., :columns].copy().view(np.float16))  # (out, groups, 1 or 2)
    codes = _codes(torch.from_numpy(np.ascontiguousarray(blocks[..., columns:])), stored.kind)

    def placed(x: Tensor) -> Tensor:
        return change_rows(x, where.change, heads, kv_heads)

    scale = placed(numbers[..., 0])
    offset = {"Q4_0": scale * -8, "Q4_1": placed(numbers[..., -1]), "Q8_0": None}[stored.kind]
    return Grid(
        placed(codes.flatten(1)).contiguous(),
        scale.t().contiguous(),
        None if offset is None else offset.t().contiguous(),
    )


def _codes(raw: Tensor, kind: str) -> Tensor:
    """Bytes (out, groups, 16 or 32) -> codes (out, groups, 32)."""
    return raw.view(torch.int8) if kind == "Q8_0" else torch.cat((raw & 15, raw >> 4), -1)
