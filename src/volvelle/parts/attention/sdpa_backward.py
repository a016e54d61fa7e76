"""A backward pass for torch's fused kernel on CPUs in bf16, whose own takes several times as long as its products.

With P = softmax(scale · Q Kᵀ) from the kernel's log-sum-exp L, and D_i = Σ dO_i · O_i (Dao et al. 2022, appendix B.4):

    dV = Pᵀ dO,   dS = P ∘ (dO Vᵀ - D),   dQ = scale · dS K,   dK = scale · dSᵀ Q

for a tile of queries at a time, against the keys that these may see. Products of bf16 are summed in fp32 but come back
rounded. So that the differences log P = scale · Q Kᵀ - L and dO Vᵀ - D are rounded and not their terms, L and D take
part in the products: as further columns, in three parts of 8 bits each, against columns of ones.

Shapes: b batch, h query heads, h_kv key/value heads, g = h / h_kv queries a group, n_q queries, n_k keys, d features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from volvelle.parts.attention.spec import only_once

TILE = 128
"""Queries in one tile."""


def fused_bf16(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Attention (b, h, n_q, d) of CPU tensors in bf16; `mask` is bool and four-dimensional, or None.

    `causal` is for as many queries as keys, and without a mask. The forward pass is torch's. Differentiable once.
    """
    return _FusedBF16.apply(q, k, v, mask, causal, scale)  # type: ignore[return-value]


def own_backward(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a gradient will be asked for of bf16 tensors on a CPU, outside of any tracing."""
    if q.dtype != torch.bfloat16 or q.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    # Fake tensors (a plan of memory) go through torch's own kernel, whose memory is planned.
    return wanted and type(q) is Tensor and q.shape[3] == v.shape[3]


class _FusedBF16(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        added = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        # Called directly, the kernel takes it for granted that features lie side by side, and reads amiss where not.
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        out, log_sum = kernel(q, k, v, 0.0, causal, attn_mask=added, scale=scale)
        ctx.save_for_backward(q, k, v, out, log_sum, mask)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            # torch's once_differentiable lets a second derivative through that would silently be 0.
            raise only_once("sdpa")
        q, k, v, out, log_sum, mask = ctx.saved_tensors
        dots = (grad.float() * out).sum(-1)  # D (b, h, n_q)
        # A query without keys has no finite L; all of its row is hidden.
        # The power of two in the scale goes into the queries, where it changes no bit but the exponent's.
        power = 2.0 ** math.floor(math.log2(ctx.scale)) if ctx.scale > 0 else 1.0
        rest = ctx.scale / power
        sums = torch.where(log_sum.isfinite(), log_sum, 0.0) / rest
        queries, grads = _with_parts(q * power, sums), _with_parts(grad, dots)
        d_q, d_k, d_v = _gradients(queries, grads, k, v, mask, ctx.causal, rest)
        return d_q.mul_(power), d_k, d_v, None, None, None


def _gradients(
    queries: Tensor, grads: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV; queries (b, h, n_q, d + 3) have L / scale behind them, grads (b, h, n_q, d_v + 3) have D.

    dQ is that of `queries` as they are given.
    """
    b, h, n_q, _ = queries.shape
    h_kv, n_k, d, d_v = k.shape[1], k.shape[2], k.shape[3], v.shape[3]
    g, pairs = h // h_kv, b * h_kv
    queries, grads = (t.reshape(pairs, g, n_q, -1) for t in (queries, grads))
    keys, values = (F.pad(t, (0, 3), value=-1.0).reshape(pairs, n_k, -1) for t in (k, v))
    d_q = torch.empty(pairs, g, n_q, d, dtype=k.dtype)
    sum_k, sum_v = (torch.zeros(pairs, n_k, width) for width in (d, d_v))
    for start in range(0, n_q, TILE):
        part = slice(start, min(start + TILE, n_q))
        seen = part.stop if causal else n_k
        rows = g * (part.stop - start)
        q_t, grad_t = (t[:, :, part].reshape(pairs, rows, -1) for t in (queries, grads))
        p = torch.bmm(q_t, keys[:, :seen].transpose(1, 2))
        p = (p if scale == 1 else p.mul_(scale)).exp_()
        shaped = p.view(pairs, g, -1, seen)
        if mask is not None:
            shaped.masked_fill_(_hidden(mask, part, shaped, b), 0)
        elif causal:
            later = torch.ones(part.stop - start, part.stop - start, dtype=torch.bool).triu(1)
            shaped[..., start:].masked_fill_(later, 0)
        sum_v[:, :seen] += torch.bmm(p.transpose(1, 2), grad_t[..., :d_v])
        d_s = torch.bmm(grad_t, values[:, :seen].transpose(1, 2)).mul_(p)
        d_q[:, :, part] = torch.bmm(d_s, keys[:, :seen, :d]).mul_(scale).view(pairs, g, -1, d)
        sum_k[:, :seen] += torch.bmm(d_s.transpose(1, 2), q_t[..., :d])
    return (
        d_q.view(b, h, n_q, d),
        sum_k.mul_(scale).to(k.dtype).view(b, h_kv, n_k, d),
        sum_v.to(v.dtype).view(b, h_kv, n_k, d_v),
    )


def _with_parts(t: Tensor, x: Tensor) -> Tensor:
    """Three columns behind t (..., d) whose sum is x (...) to 24 bits."""
    high = x.to(t.dtype)
    middle = (x - high).to(t.dtype)
    low = (x - high - middle).to(t.dtype)
    return torch.cat([t, torch.stack([high, middle, low], dim=-1)], dim=-1)


def _hidden(mask: Tensor, part: slice, p: Tensor, b: int) -> Tensor:
    """What a tile may not see, as a mask that broadcasts to p (b h_kv, g, queries, keys)."""
    pairs, g = p.shape[:2]
    rows = mask if mask.shape[2] == 1 else mask[:, :, part]
    if rows.shape[:2] == (1, 1):
        return ~rows
    whole = rows.expand(b, pairs // b * g if rows.shape[1] > 1 else 1, *rows.shape[2:])
    if whole.shape[1] == 1:
        whole = whole.expand(b, pairs // b, *rows.shape[2:])
        return ~whole.reshape(pairs, 1, *rows.shape[2:])
    return ~whole.reshape(pairs, g, *rows.shape[2:])
