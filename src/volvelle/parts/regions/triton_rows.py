"""The kernels of rows.py in Triton: sums of rows, and the gradients of table and weights.

A program makes BLOCK_M results of BLOCK_C columns and walks through their taps. It keeps the sums on the chip, so each
row is read once where it is needed, and nothing of size (m, t, c) exists. The table's gradient is added up by atomics.
Run in Triton's interpreter (TRITON_INTERPRET=1, on the CPU) and compiled for sm_80 and sm_90; on a device they have not
been measured. Imported with the first call.

Shapes: table (n, c), at (m, t), weight (m, t), sums (m, c).
"""

# pyright: reportArgumentType=false
# (Triton declares constexpr where plain values are given, and Python sees no difference.)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, WIDEST = 8, 128
"""Results of a program, and the most columns of one."""


@triton.jit
def sum_rows(table, at, weight, sums, m, t, c, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):  # noqa: PLR0917
    """Write sums (m, c); grid (M-blocks, C-blocks)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (i < m)[:, None] & (j < c)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_C], sums.dtype.element_ty)
    for tap in range(t):
        row = tl.load(at + i * t + tap, mask=i < m, other=0)
        share = tl.load(weight + i * t + tap, mask=i < m, other=0.0)
        total += share[:, None] * tl.load(table + row[:, None] * c + j[None, :], mask=inside, other=0.0)
    tl.store(sums + i[:, None] * c + j[None, :], total, mask=inside)


@triton.jit
def add_to_rows(grad, at, weight, found, m, t, c, n, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):  # noqa: PLR0917
    """Add to `found` (n, c), which is zero, what grad (m, c) means for each row; grid (M-blocks, C-blocks).

    A tap without weight at the last row adds nothing: that is where all reads outside a map meet.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (i < m)[:, None] & (j < c)[None, :]
    towards = tl.load(grad + i[:, None] * c + j[None, :], mask=inside, other=0.0)
    for tap in range(t):
        row = tl.load(at + i * t + tap, mask=i < m, other=0)
        share = tl.load(weight + i * t + tap, mask=i < m, other=0.0)
        counts = (row < n - 1) | (share != 0)
        tl.atomic_add(
            found + row[:, None] * c + j[None, :], share[:, None] * towards,
            mask=inside & counts[:, None], sem="relaxed",
        )  # fmt: skip


@triton.jit
def multiply_rows(table, at, grad, found, m, t, c, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):  # noqa: PLR0917
    """Write `found` (m, t), the products of grad (m, c) with each tap's row; grid (M-blocks, taps)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tap = tl.program_id(1)
    row = tl.load(at + i * t + tap, mask=i < m, other=0)
    total = tl.zeros([BLOCK_M, BLOCK_C], found.dtype.element_ty)
    for start in range(0, c, BLOCK_C):
        j = start + tl.arange(0, BLOCK_C)
        inside = (i < m)[:, None] & (j < c)[None, :]
        towards = tl.load(grad + i[:, None] * c + j[None, :], mask=inside, other=0.0)
        total += towards * tl.load(table + row[:, None] * c + j[None, :], mask=inside, other=0.0)
    tl.store(found + i * t + tap, tl.sum(total, 1), mask=i < m)


def sums(table: Tensor, at: Tensor, weight: Tensor) -> Tensor:
    """Σ_t weight[i, t] table[at[i, t]]."""
    (m, t), c = at.shape, table.shape[1]
    found = table.new_empty(m, c)
    tensors = (table.contiguous(), at.contiguous(), weight.to(table.dtype).contiguous(), found)
    _start(sum_rows, (m, c), (*tensors, m, t, c))
    return found


def table_gradient(grad: Tensor, at: Tensor, weight: Tensor, rows: int) -> Tensor:
    """What grad (m, c) means for each of the table's rows: (rows, c)."""
    (m, t), c = at.shape, grad.shape[1]
    found = grad.new_zeros(rows, c)
    tensors = (grad.contiguous(), at.contiguous(), weight.to(grad.dtype).contiguous(), found)
    _start(add_to_rows, (m, c), (*tensors, m, t, c, rows))
    return found


def weight_gradient(table: Tensor, at: Tensor, grad: Tensor) -> Tensor:
    """What grad (m, c) means for each tap: (m, t)."""
    (m, t), c = at.shape, table.shape[1]
    found = table.new_zeros(m, t)
    _start(multiply_rows, (m, c), (table.contiguous(), at.contiguous(), grad.contiguous(), found, m, t, c), taps=t)
    return found


def _start(kernel: Any, shape: tuple[int, int], arguments: tuple[Any, ...], taps: int | None = None) -> None:
    """Run a kernel over results (m, c): a program a block of both, or with `taps` a block of rows and each tap."""
    m, c = shape
    if not (m and c and taps != 0):
        return
    columns = min(triton.next_power_of_2(c), WIDEST)
    grid = (triton.cdiv(m, BLOCK_M), triton.cdiv(c, columns) if taps is None else taps)
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, BLOCK_M=BLOCK_M, BLOCK_C=columns, num_warps=4)
