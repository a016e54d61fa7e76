"""Cutting attention into tiles: how large they are, which of them anybody sees, and dropout without a stored mask.

Shapes: b batch, h query heads, n_q queries, n_k keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Window = tuple[int | None, int | None]
"""How many keys before and after its own place a query sees; None: all."""

TILE_NUMBERS = 512 * 1024
"""Scores in one tile, over all heads and the batch: 2 MiB in fp32, about the second-level cache of a core."""
SMALLEST, LARGEST = 64, 512


class Tile(NamedTuple):
    """Queries i0 .. i1 against keys j0 .. j1; `partial` when causal order or the window hides some of them."""

    i0: int
    i1: int
    j0: int
    j1: int
    partial: bool


def tile_side(b: int, h: int, causal: bool = False, window: Window | None = None) -> int:
    """Queries, and keys, of a tile: a power of two, so that all heads' scores together fit into a cache.

    A window narrower than that gives smaller tiles, of which it hides less.

    >>> tile_side(1, 8), tile_side(32, 32), tile_side(1, 8, True, (255, None))
    (256, 64, 128)
    """
    left, right = reach(causal, window)
    seen = None if left is None or right is None else left + right + 1
    side = SMALLEST
    while side < LARGEST and 4 * b * h * side * side <= TILE_NUMBERS and (seen is None or 2 * side < seen):
        side *= 2
    return side


def reach(causal: bool, window: Window | None) -> Window:
    """How many keys before and after its own place a query sees, causal order included; None: all."""
    left, right = window or (None, None)
    if causal:
        right = 0 if right is None else min(right, 0)
    return left, right


def tile_rows(
    n_q: int, n_k: int, side: int, causal: bool, window: Window | None
) -> Iterator[tuple[int, int, list[Tile]]]:
    """Yield (i0, i1, the tiles that these queries see any key of)."""
    shift = n_k - n_q  # the place of query i among the keys is i + shift
    left, right = reach(causal, window)
    for i0 in range(0, n_q, side):
        i1 = min(i0 + side, n_q)
        first = 0 if left is None else max(0, i0 + shift - left)
        last = n_k if right is None else min(n_k, i1 + shift + right)  # one beyond
        tiles = []
        for j0 in range(first // side * side, last, side):
            j1 = min(j0 + side, n_k)
            hidden = (left is not None and j0 < i1 - 1 + shift - left) or (
                right is not None and j1 - 1 > i0 + shift + right
            )
            tiles.append(Tile(i0, i1, j0, j1, hidden))
        yield i0, i1, tiles


def visible(n_q: int, n_k: int, causal: bool, window: Window | None, device: torch.device) -> Tensor:
    """Return the whole (n_q, n_k) bool mask of causal order and window, aligned to the last key.

    >>> visible(2, 4, True, (1, None), torch.device("cpu")).int()
    tensor([[0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    return seen(Tile(0, n_q, 0, n_k, True), n_k - n_q, causal, window, device)


def seen(tile: Tile, shift: int, causal: bool, window: Window | None, device: torch.device) -> Tensor:
    """Return the (queries, keys) bool mask of one tile; query i stands at key i + shift."""
    left, right = reach(causal, window)
    ahead = torch.arange(tile.j0, tile.j1, device=device) - torch.arange(tile.i0, tile.i1, device=device)[:, None]
    ahead = ahead - shift  # how far the key lies after the query's own place
    allowed = torch.ones_like(ahead, dtype=torch.bool)
    if left is not None:
        allowed &= ahead >= -left
    if right is not None:
        allowed &= ahead <= right
    return allowed


class Dropout(NamedTuple):
    """Dropout of attention weights whose mask is drawn again, tile by tile, from a seed, whenever it is needed.

    A tile's draws depend on the seed, its place and its size only, so forward, backward and the back ends agree.
    """

    p: float
    seed: int

    @classmethod
    def draw(cls, p: float) -> Dropout:
        """Take a seed from torch's global generator; a traced graph has none and draws for itself."""
        if torch.compiler.is_compiling():
            return cls(p, 0)
        return cls(p, int(torch.randint(2**62, ()).item()))

    def row(self, i: int) -> Dropout:
        """Dropout of one row of a batch whose rows are computed one by one."""
        return Dropout(self.p, _mix(self.seed ^ _mix(i)))

    def factors(self, tile: Tile, b: int, h: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return what the weights (b, h, queries, keys) of a tile are multiplied by: 0, or 1 / (1 - p)."""
        generator = torch.Generator(device).manual_seed(_mix(_mix(self.seed) ^ (tile.i0 << 32 | tile.j0)))
        shape = (b, h, tile.i1 - tile.i0, tile.j1 - tile.j0)
        numbers = math.prod(shape)
        # 16 random bits a weight, four weights a draw, compared straight into floating point: a fifth of the time of
        # bernoulli_, whose draws are a weight each. p is rounded to the next 1/65536 and its share made up for exactly.
        draws = torch.empty(-(-numbers // 4), dtype=torch.int64, device=device)
        lanes = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[:numbers].view(shape)
        kept, limit = torch.empty(shape, dtype=dtype, device=device), round(self.p * 65536)
        torch.ge(lanes, limit - 32768, out=kept)
        return kept.mul_(65536 / (65536 - limit)) if limit < 65536 else kept.zero_()

    def whole(self, side: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the factors of all weights (b, h, n_q, n_k) cut into tiles of `side`, for back ends that hold them."""
        b, h, n_q, n_k = shape
        rows = []
        for i0, i1, tiles in tile_rows(n_q, n_k, side, False, None):
            row = [self.factors(tile, b, h, dtype, device) for tile in tiles]
            rows.append(torch.cat(row, -1) if row else torch.empty(b, h, i1 - i0, 0, dtype=dtype, device=device))
        return torch.cat(rows, 2) if rows else torch.empty(shape, dtype=dtype, device=device)


def _mix(x: int) -> int:
    """Spread 64 bits (the finalizer of SplitMix64): torch's CPU generator looks at the low 32 bits of a seed only."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31
