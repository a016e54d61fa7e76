"""torch's scaled_dot_product_attention as a back end: the fused kernel wherever its terms fit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from volvelle.parts.attention.spec import Shape, Spec, Terms


class SDPA:
    """torch's kernel. One step of decoding with grouped queries folds the group into the query length."""

    name = "sdpa"

    def supports(self, spec: Spec) -> str | None:
        """Serve all but biases with a value term, which the kernel cannot add to its output."""
        if spec.value_term:
            return "the bias adds a value term, which the fused kernel does not have"
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms, shape: Shape) -> Tensor:
        """Return (b, h, n_q, d_v)."""
        b, h, h_kv, n_q, n_k, d, d_v = shape
        grouped, scale = h != h_kv, terms.scale
        if terms.bias is None and terms.mask is None and terms.causal and 1 < n_q == n_k:
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        mask = self._mask(q, k, terms, shape)
        if n_q == 1 and grouped:  # (b, h, 1, d) -> (b, h_kv, group, d): each key is read once for its whole group
            if mask is not None and mask.shape[1] != 1:
                mask = mask.expand(-1, h, -1, -1).reshape(mask.shape[0], h_kv, h // h_kv, -1)
            folded = q.reshape(b, h_kv, h // h_kv, d)
            return scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale).reshape(b, h, 1, d_v)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)

    def _mask(self, q: Tensor, k: Tensor, terms: Terms, shape: Shape) -> Tensor | None:
        """Merge mask, causal and bias into one four-dimensional mask, bool where there is no bias."""
        mask = terms.allowed(shape, q.device)
        if terms.bias is not None:
            bias = terms.whole_bias(q, k)
            assert bias is not None, "attention: a Bias must return a tile"
            mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
            mask = mask.to(q.dtype)
        if mask is not None and mask.dim() < 4:
            mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        return mask
