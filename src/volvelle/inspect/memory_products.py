"""What oneDNN holds besides the result while it multiplies matrices in half precision, for each instruction set.

A (m, k) times B (k, n), `batch` of them, in t threads. torch 2.13 with oneDNN 3.12 was measured, and its sources read:

- AVX-512 with bf16: exact. Each thread packs one block of B, gathers one of A where its rows do not lie in memory as
  rows, and sums a block of the result in fp32. How large the blocks are is a search over few numbers, repeated here.
- AVX-512 without bf16: exact. The sums of a whole result, in fp32.
- AMX: within a few per cent of a small step. Panels of 32 columns, fitted to what the allocator saw.
- No AVX-512, or fp16 where only AMX multiplies it: torch multiplies itself and packs nothing.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

Instructions = Literal["amx", "avx512_bf16", "avx512", "none"]

SMALL = 16**3  # torch asks oneDNN for products of more multiplications than this
WIDTH = 64  # columns of a block of B
_ENTRY, _LINE = 640, 128  # a thread's list of blocks; the alignment of each buffer


@dataclass(frozen=True)
class Product:
    """Sizes of a product; `transposed` says that the columns of A, not its rows, lie together in memory."""

    m: int
    k: int
    n: int
    batch: int = 1
    transposed: bool = False


@dataclass(frozen=True)
class _Blocks:
    """One way to cut a product: rows and blocks of columns that a thread takes at once, and threads that share k."""

    rows: int
    columns: int
    sharing: int


@functools.cache
def instructions() -> Instructions:
    """What this processor multiplies bf16 with."""
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    if torch.cpu._is_avx512_bf16_supported():
        return "avx512_bf16"
    return "avx512" if torch.cpu._is_avx512_supported() else "none"


def product_scratch(product: Product, dtype: torch.dtype, threads: int, isa: Instructions) -> int:
    """Bytes that a product in `dtype` (bf16 or fp16) holds besides its operands and its result.

    >>> product_scratch(Product(256, 64, 64), torch.bfloat16, 1, "avx512_bf16")
    74752
    """
    if math.prod((product.batch, product.m, product.k, product.n)) <= SMALL:
        return 0
    if isa == "amx":
        # Products of batches were not measured there.
        return 0 if product.batch > 1 else _panels(product, threads)
    if dtype != torch.bfloat16 or isa == "none":
        return 0
    return _sums(product, threads) if isa == "avx512" else _blocks(product, threads)


def _panels(product: Product, threads: int) -> int:
    """AMX: of a transposed A up to 256 rows and two panels of B, else all panels of B; both within the cache."""
    k, n = _up(product.k, 32), _up(product.n, 32)
    if product.transposed:
        rows = min(_up(-(-product.m // threads), 32), 256)
        panels = min(2 * k * (rows + 64), 800 * 1024)
    else:
        panels = min(2 * k * n, 1280 * 1024)
    return threads * (panels + 5 * 1024)


def _sums(product: Product, threads: int) -> int:
    """AVX-512 alone: all threads share the fp32 result of one product, or each has one of the batch."""
    each = min(threads, product.batch)
    return each * _up(4 * product.m * product.n, 256 * -(-threads // each)) + _LINE


@functools.lru_cache(maxsize=4096)
def _blocks(product: Product, threads: int) -> int:
    """AVX-512 with bf16: a block of B, of A where it is gathered, and of the fp32 sums, in each thread."""
    if product.n == 1 and product.batch == 1:  # torch asks for the transposed product
        product = Product(1, product.k, product.m, transposed=True)
    m, k, n = product.m, product.k, product.n
    # Rows of a large power of two would fall on the same lines of the cache: they are gathered too.
    gathered = m > 1 and (product.transposed or (m >= 1024 and k >= 4096 and _is_power(k)))
    depth = min(k, 1024 if k > 1024 and m > 1 and not product.transposed else 512)
    cut = _cut(product, threads, depth, gathered)
    padded = _up(depth, 32)
    a = 2 * cut.rows * (padded + (32 if padded >= 512 and _is_power(padded) else 0)) if gathered else 0
    b = 2 * WIDTH * padded
    # More than one step along k sums all columns that the thread took; threads that share k sum whole results.
    c = 4 * (m * n if cut.sharing > 1 else cut.rows * min(WIDTH, n) * (cut.columns if k > depth else 1))
    return threads * (_ENTRY + a + b + c) + (4 if gathered else 3) * _LINE


def _cut(product: Product, threads: int, depth: int, gathered: bool) -> _Blocks:
    """The cut that oneDNN finds the most even: of the work, the last rows, the last columns, the threads and k.

    It takes the first of equals and rounds to fp32, so order and rounding are the same here.
    """
    m, k, f32 = product.m, product.k, np.float32
    width = min(WIDTH, product.n)
    columns = -(-product.n // width)
    idle = threads > columns * product.batch  # more threads than blocks of columns: fewer rows, or shares of k
    rows = np.arange(min(256, m), min(m, 16 if idle else 32) - 1, -1)
    share = idle and product.batch == 1 and product.transposed and m > 1 and k >= 2048 and _is_power(k)
    last_rows = (rows * -(-m // rows) % m).astype(f32) / f32(m)
    most = min(threads, 4) if share else 1
    best, found = f32(1), _Blocks(int(rows[-1]), 1, 1)
    for sharing in range(most, 0, -1):
        teams = threads // sharing
        without, last_depth = f32((threads - teams * sharing) / threads), _unevenness(np.asarray(k), sharing * depth)
        for taken in range(min(16 if gathered else 1, columns), 0, -1):
            groups = -(-columns // taken)
            work = -(-m // rows) * groups * product.batch
            last_columns = f32(groups * taken - columns) / f32(columns)
            score = (_unevenness(work, teams) + last_rows + last_columns + without + last_depth) / f32(5)
            if most == 1:  # a few parts that leave threads without one are not considered
                score = np.where((work < 3 * teams) & (work % teams != 0), f32(2), score)
            first = int(score.argmin())
            if score[first] < best:
                best, found = score[first], _Blocks(int(rows[first]), taken, sharing)
    return found


def _unevenness(work: np.ndarray, parts: int) -> np.ndarray:
    """How far `work` is from a multiple of `parts`, as a share of them."""
    over = work % parts
    return np.where(work < parts, parts - over, np.minimum(parts - over, over)).astype(np.float32) / np.float32(parts)


def _is_power(value: int) -> bool:
    return value & (value - 1) == 0


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
