"""torch's scaled_dot_product_attention as a back end: the fused kernel wherever its terms fit.

Shapes: b batch, h query heads, h_kv key/value heads, g = h / h_kv queries a group, n_q queries, n_k keys, d features.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from volvelle.parts.attention.sdpa_backward import fused_bf16, own_backward
from volvelle.parts.attention.spec import Shape, Spec, Terms, only_once
from volvelle.parts.position.encoding import Bias

FOLD_QUERIES = 8
"""Up to this many grouped 16-bit queries are folded: measured 0.5-0.7x the time over 500 to 2000 keys on a CPU."""


SMALL = 128 * 128
"""Queries times keys up to which holding all scores costs less than cutting them into tiles."""


class SDPA:
    """torch's kernel, with causal order aligned to the end and 0 for queries that may attend to nothing.

    A few queries in groups (a step of decoding) are folded, (b, h, n_q, d) -> (b, h_kv, g n_q, d), so that each key is
    read once for its group. `zero_rows_on` lists the devices whose kernels are known to give 0, with finite gradients,
    where a whole row is masked; elsewhere such rows attend to everything and are set to 0 afterwards.
    """

    name = "sdpa"

    def __init__(self, zero_rows_on: Collection[str] = ("cpu",)) -> None:
        self.zero_rows_on = frozenset(zero_rows_on)

    def supports(self, spec: Spec) -> str | None:
        """Serve what the fused kernel holds no (n_q, n_k) tensor for, and small calls where it does."""
        if spec.tangents or spec.order > 1:
            return "the fused kernel has no second and no forward-mode derivative"
        if spec.value_term:
            return "the bias adds a value term, which the fused kernel does not have"
        if spec.lse:
            return "the fused kernel does not give the log-sum-exp"
        if spec.dropout:
            return "with dropout the kernel holds the whole mask, and draws it by torch's own rule"
        if spec.shape.n_q * spec.shape.n_k > SMALL:
            if spec.learnable_bias and not spec.factored:
                return "the bias needs a gradient, for which the kernel holds all scores"
            if spec.window:
                return "the kernel computes what the window hides"
            if spec.segments:
                return "the kernel would need the segments as a mask of all pairs"
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms, shape: Shape) -> Tensor:
        """Return (b, h, n_q, d_v)."""
        if terms.factored(shape.n_q, shape.n_k):
            return self._carried(q, k, v, terms, shape)
        grouped, scale = shape.h != shape.h_kv, terms.scale
        if (
            terms.bias is None
            and terms.mask is None
            and terms.causal
            and terms.window is None
            and terms.segments is None
            and 1 < shape.n_q == shape.n_k
        ):
            if own_backward(q, k, v):
                return fused_bf16(q, k, v, None, True, scale)
            return _kernel(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        allowed, empty = terms.allowed(shape, q.device), None
        if allowed is not None and q.device.type not in self.zero_rows_on:
            empty = ~allowed.any(-1, keepdim=True)
            allowed = allowed | empty
        mask = _merge(allowed, terms.whole_bias(q, k), q.dtype)
        if grouped and (shape.n_q == 1 or (shape.n_q <= FOLD_QUERIES and q.dtype.itemsize == 2)):
            out = _folded(q, k, v, mask, scale, shape)
        elif terms.bias is None and own_backward(q, k, v):
            out = fused_bf16(q, k, v, mask, False, scale)
        else:
            out = _kernel(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
        return out if empty is None else out.masked_fill(empty, 0)

    def _carried(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms, shape: Shape) -> Tensor:
        """The same with the bias A B^T in further features: (q, A / scale) · (k, B), scaled, is scale q · k + A B^T.

        The kernel wants v as wide: it is filled up with zeros, whose columns are cut off again.
        """
        assert isinstance(terms.bias, Bias)
        of_query, of_key = terms.bias.factors(q, k)
        q = torch.cat((q, (of_query / terms.scale).to(q.dtype).expand(*q.shape[:3], -1)), dim=-1)
        k = torch.cat((k, of_key.to(k.dtype).expand(*k.shape[:3], -1)), dim=-1)
        wide = max(q.shape[3], shape.d_v)
        q, k, v = (pad(x, (0, wide - x.shape[3])) for x in (q, k, v))
        plain = terms._replace(bias=None, q_positions=None, k_positions=None)
        return self(q, k, v, plain, shape._replace(d=wide, d_v=wide))[..., : shape.d_v]


def _merge(allowed: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return one four-dimensional mask: bool where there is no bias, else of the dtype of the queries."""
    mask = allowed
    if bias is not None:
        mask = (bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)).to(dtype)
    if mask is not None and mask.dim() < 4:
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    return mask


def _folded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, shape: Shape) -> Tensor:
    b, h, h_kv, n_q, _, d, d_v = shape
    g = h // h_kv
    if mask is not None and (mask.shape[1] != 1 or mask.shape[2] != 1):
        m_b, m_h, _, m_k = mask.shape
        if m_h == 1:
            mask = mask.unsqueeze(2).expand(m_b, 1, g, n_q, m_k).reshape(m_b, 1, g * n_q, m_k)
        else:
            mask = mask.expand(m_b, h, n_q, m_k).reshape(m_b, h_kv, g * n_q, m_k)
    out = _kernel(q.reshape(b, h_kv, g * n_q, d), k, v, attn_mask=mask, scale=scale)
    return out.reshape(b, h, n_q, d_v)


def _kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Call torch's kernel; where a fused one ran, a second derivative raises our error and not torch's."""
    out = scaled_dot_product_attention(q, k, v, **options)
    node = None if torch.compiler.is_compiling() else out.grad_fn
    # The form of plain products, which torch takes for some calls on a card, has all derivatives: its node is another.
    if node is not None and node.name().startswith("ScaledDotProduct"):
        node.register_hook(_watch)
    return out


def _watch(grads: tuple[Tensor | None, ...], _: object) -> None:
    """Called with the gradients of q, k and v; only where they get gradients themselves is there more to do."""
    if torch.is_grad_enabled():
        for grad in grads:
            if grad is not None and grad.requires_grad:
                grad.register_hook(_refuse)


def _refuse(grad: Tensor) -> NoReturn:
    raise only_once("sdpa")
