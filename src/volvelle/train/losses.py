"""Cross-entropy over a large vocabulary without ever holding all the logits.

For N positions and V words the logits are N V numbers (49,152 words: 200 MB a thousand positions, three times over with
their softmax and gradient). Here positions are taken a chunk at a time, and the gradient of a chunk is computed in the
forward pass while its logits are at hand, so that nothing of size V is kept for the backward pass.

Shapes: N positions, d width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 32 * 2**20
"""Logits of one chunk in fp32."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, chunk: int | None = None
) -> Tensor:
    """Mean cross-entropy of softmax(hidden weightᵀ) against targets: mean over i of log Σ_v exp(z_iv) - z_i,target.

    hidden (N, d), weight (V, d), targets (N,) int64 -> a scalar in fp32 (fp64 for fp64). Positions with `ignore_index`
    are neither projected nor counted; without any other the result is 0. `chunk` positions are projected at a time
    (default: 32 MB of logits). Under autocast the products run in its dtype; softmax and sums are not. Differentiable
    once in hidden and weight. In fp16 each chunk's logits are computed again in the backward pass instead, where the
    gradients are made at the loss scale that keeps them from underflow. Raises ValueError on shapes that do not fit.

    >>> h, w = torch.eye(2), torch.eye(2)
    >>> round(linear_cross_entropy(h, w, torch.tensor([0, 1])).item(), 4)
    0.3133
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            "linear_cross_entropy: wants hidden (N, d), weight (V, d), targets (N,), "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        )
    hidden, targets = _kept(hidden, targets, ignore_index)
    if not len(targets):
        return hidden.sum().float() * 0
    if computing_in(hidden) == torch.float16:
        # Made in the forward pass, the gradients would underflow before the loss scale has reached them.
        return head_cross_entropy(
            hidden, lambda h: h @ weight.T, targets, vocabulary=weight.shape[0], ignore_index=ignore_index, chunk=chunk
        )
    return ChunkedCrossEntropy.apply(hidden, weight, targets, chunk or chunk_rows(weight.shape[0]))  # type: ignore[return-value]


def head_cross_entropy(
    hidden: Tensor, head: Any, targets: Tensor, *, vocabulary: int, ignore_index: int = -100, chunk: int | None = None
) -> Tensor:
    """The same for any head (a bias, a transform, an adapter): each chunk's logits are computed again in backward.

    `head` maps hidden (n, d) to logits (n, V). One more product a chunk than `linear_cross_entropy`, and differentiable
    as often as the head is.
    """
    hidden, targets = _kept(hidden, targets, ignore_index)
    if not len(targets):
        return hidden.sum().float() * 0
    rows = chunk or chunk_rows(vocabulary)

    def part(h: Tensor, t: Tensor) -> Tensor:
        z = head(h)
        return torch.nn.functional.cross_entropy(z.to(_wide(z.dtype)), t, reduction="sum")

    pairs = zip(hidden.split(rows), targets.split(rows), strict=True)
    sums = [checkpoint(part, h, t, use_reentrant=False) for h, t in pairs]
    return torch.stack(sums).sum() / len(targets)


def _kept(hidden: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    kept = (targets != ignore_index).nonzero()[:, 0]
    return (hidden, targets) if len(kept) == len(targets) else (hidden.index_select(0, kept), targets[kept])


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Softmax and sums: fp64 stays, everything else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def computing_in(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with x here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def chunk_rows(vocabulary: int) -> int:
    """How many positions of a vocabulary of that size make a chunk."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


class ChunkedCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` of given chunks: forward gives the loss and its gradients, backward only scales them.

    `apply(hidden, weight, targets, rows)`: (N, d), (V, d), (N,) without ignored targets, positions of a chunk.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        """The loss; its gradients are made on the way."""
        kind, dtype = hidden.device.type, computing_in(hidden)
        h, w, count = hidden.to(dtype), weight.to(dtype), len(targets)
        need_h, need_w = ctx.needs_input_grad[:2]
        grad_h = torch.empty_like(h) if need_h else None
        # Summed over chunks in the weight's own dtype: many small chunks would drown in bf16.
        grad_w = torch.zeros_like(weight) if need_w else None
        total = torch.zeros((), device=hidden.device, dtype=_wide(dtype))
        with torch.autocast(kind, enabled=False):
            for start in range(0, count, rows):
                part = slice(start, min(start + rows, count))
                _chunk(h[part], w, targets[part], count, total, grad_h[part] if grad_h is not None else None, grad_w)
        ctx.save_for_backward(grad_h, grad_w)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        """The gradients, scaled."""
        grad_h, grad_w = ctx.saved_tensors
        dtype_h, dtype_w = ctx.dtypes
        return (
            None if grad_h is None else (grad_h * grad.to(grad_h.dtype)).to(dtype_h),
            None if grad_w is None else (grad_w * grad.to(grad_w.dtype)).to(dtype_w),
            None,
            None,
        )


def _chunk(
    h: Tensor, w: Tensor, targets: Tensor, count: int, total: Tensor, grad_h: Tensor | None, grad_w: Tensor | None
) -> None:
    """Add one chunk: its loss to `total`, its gradients into `grad_h` (n, d) and `grad_w` (V, d)."""
    at = targets[:, None]
    z = torch.log_softmax((h @ w.T).to(total.dtype), 1)  # (n, V)
    total -= z.gather(1, at)[:, 0].sum() / count
    if grad_h is None and grad_w is None:
        return
    # d loss / d z = (softmax(z) - onehot(target)) / count, written over z. The products, which are far smaller than z,
    # are divided in its place.
    z.exp_().scatter_add_(1, at, torch.full_like(at, -1, dtype=z.dtype))
    g = z.to(h.dtype)
    if grad_h is not None:
        torch.mm(g, w, out=grad_h)
        grad_h.div_(count)
    if grad_w is not None:
        grad_w.add_(g.T @ h, alpha=1 / count)
