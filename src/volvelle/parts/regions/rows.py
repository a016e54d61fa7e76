"""Weighted sums of a few rows of a table: what every read between pixels is, and where its time goes.

    sums[i] = Σ_t weight[i, t] table[at[i, t]]

In plain PyTorch these are bags of embeddings: the sums are made row by row, and the rows that they need are never
copied out. On CUDA, where Triton is installed, each of the three passes is one kernel (triton_rows.py). Those are
custom operators with the plain version as their meaning: on any other device they are it. A second derivative is made
of plain operations everywhere, and so is the table's gradient where torch.use_deterministic_algorithms asks for the
same bits every time: the kernel adds up by atomics.

Shapes: table (n, c) fp32 or fp64, at (m, t) int64, weight (m, t), sums (m, c).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from volvelle.parts.attention.triton import INSTALLED, INTERPRETED


def served(table: Tensor) -> bool:
    """Whether the kernels make the sums of this table."""
    return INSTALLED and table.is_cuda


def row_sums(table: Tensor, at: Tensor, weight: Tensor) -> Tensor:
    """Return Σ_t weight[i, t] table[at[i, t]], (m, c), with first and second derivatives for table and weight."""
    if torch.onnx.is_in_onnx_export():  # ONNX has no bags
        return (table[at] * weight[..., None]).sum(1)
    return _RowSums.apply(table, at, weight)


class _RowSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, at: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(table, at, weight)
        return (fused_sums if served(table) else plain_sums)(table, at, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        table, at, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # a second derivative is wanted
        for_table = for_weight = None
        if ctx.needs_input_grad[0]:
            fused = served(table) and not torch.are_deterministic_algorithms_enabled()
            how = _scattered if again else fused_table_gradient if fused else plain_table_gradient
            for_table = how(grad, at, weight, table.shape[0])
        if ctx.needs_input_grad[2]:
            fused = fused_weight_gradient if served(table) else plain_weight_gradient
            for_weight = (table[at] * grad[:, None]).sum(-1) if again else fused(table, at, grad)
        return for_table, None, for_weight


def _scattered(grad: Tensor, at: Tensor, weight: Tensor, rows: int) -> Tensor:
    """The table's gradient in operations that have derivatives themselves."""
    each = (weight[..., None] * grad[:, None]).flatten(0, 1)
    return grad.new_zeros(rows, grad.shape[1]).index_add(0, at.flatten(), each)


def plain_sums(table: Tensor, at: Tensor, weight: Tensor) -> Tensor:
    """Bags of embeddings."""
    return F.embedding_bag(at, table, mode="sum", per_sample_weights=weight)


def plain_table_gradient(grad: Tensor, at: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Bags too: every row of the table sums up the results that it went into."""
    numbers, order = at.flatten().sort(stable=True)
    starts = torch.searchsorted(numbers, torch.arange(rows, device=at.device))
    return F.embedding_bag(order // at.shape[1], grad, starts, mode="sum", per_sample_weights=weight.flatten()[order])


def plain_weight_gradient(table: Tensor, at: Tensor, grad: Tensor) -> Tensor:
    """Each tap's grad · table[at]."""
    m, t = at.shape
    starts = torch.arange(m, device=at.device) * t
    bag = torch.arange(m, device=at.device)[:, None].expand(m, t).flatten()
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, table, at.flatten(), starts, bag, 0, -1
    ).view(m, t)


def _by_kernel(x: Tensor) -> bool:
    return x.is_cuda or INTERPRETED


@torch.library.custom_op("volvelle::row_sums", mutates_args=())
def fused_sums(table: Tensor, at: Tensor, weight: Tensor) -> Tensor:
    """The sums, in one kernel on CUDA."""
    if not _by_kernel(table):
        return plain_sums(table, at, weight)
    from volvelle.parts.regions import triton_rows

    return triton_rows.sums(table, at, weight)


@torch.library.custom_op("volvelle::row_sums_table_gradient", mutates_args=())
def fused_table_gradient(grad: Tensor, at: Tensor, weight: Tensor, rows: int) -> Tensor:
    """The table's gradient (rows, c), in one kernel on CUDA."""
    if not _by_kernel(grad):
        return plain_table_gradient(grad, at, weight, rows)
    from volvelle.parts.regions import triton_rows

    return triton_rows.table_gradient(grad, at, weight, rows)


@torch.library.custom_op("volvelle::row_sums_weight_gradient", mutates_args=())
def fused_weight_gradient(table: Tensor, at: Tensor, grad: Tensor) -> Tensor:
    """The weights' gradient (m, t), in one kernel on CUDA."""
    if not _by_kernel(table):
        return plain_weight_gradient(table, at, grad)
    from volvelle.parts.regions import triton_rows

    return triton_rows.weight_gradient(table, at, grad)


@fused_sums.register_fake
def _(table: Tensor, at: Tensor, weight: Tensor) -> Tensor:
    return table.new_empty(at.shape[0], table.shape[1])


@fused_table_gradient.register_fake
def _(grad: Tensor, at: Tensor, weight: Tensor, rows: int) -> Tensor:
    return grad.new_empty(rows, grad.shape[1])


@fused_weight_gradient.register_fake
def _(table: Tensor, at: Tensor, grad: Tensor) -> Tensor:
    return table.new_empty(at.shape)
