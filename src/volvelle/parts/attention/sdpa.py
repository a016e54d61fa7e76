"""torch's scaled_dot_product_attention as a back end: the fused kernel wherever its terms fit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from volvelle.parts.attention.spec import Spec, Terms


class SDPA:
    """torch's kernel. One step of decoding with grouped queries folds the group into the query length."""

    name = "sdpa"

    def supports(self, spec: Spec) -> str | None:
        """Serve all but biases with a value term, which the kernel cannot add to its output."""
        if spec.value_term:
            return "the bias adds a value term, which the fused kernel does not have"
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
        """Return (b, h, n_q, d_v)."""
        b, h, n_q, d = q.shape
        h_kv, n_k = k.shape[1], k.shape[2]
        scale = terms.scale
        if terms.bias is None and terms.mask is None:
            if terms.causal and n_q == n_k and n_q > 1:
                return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=h != h_kv)
            if n_q == 1 or not terms.causal:
                if n_q == 1 and h != h_kv:  # (b, h, 1, d) -> (b, h_kv, group, d): each key is read once
                    folded = q.reshape(b, h_kv, h // h_kv, d)
                    return scaled_dot_product_attention(folded, k, v, scale=scale).reshape(b, h, 1, -1)
                return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=h != h_kv)
        mask = self._mask(q, k, terms)
        if n_q == 1 and h != h_kv:
            group = h // h_kv
            if mask.shape[1] != 1:
                mask = mask.reshape(mask.shape[0], h_kv, group, n_k)
            folded = q.reshape(b, h_kv, group, d)
            return scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale).reshape(b, h, 1, -1)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=h != h_kv)

    def _mask(self, q: Tensor, k: Tensor, terms: Terms) -> Tensor:
        """Merge mask, causal and bias into one four-dimensional mask, bool where there is no bias."""
        bias, allowed = terms.tile(q, k), terms.allowed(q, k)
        if bias is None:
            assert allowed is not None, "attention: sdpa was asked for a mask where nothing is hidden"
            mask = allowed
        else:
            mask = bias.to(q.dtype)
            if allowed is not None:
                mask = mask.masked_fill(~allowed, -torch.inf)
        while mask.dim() < 4:
            mask = mask.unsqueeze(0)
        return mask
