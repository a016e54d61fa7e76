"""Attention written out: the back end the others are compared with (Vaswani et al. 2017, section 3.2.1).

out = softmax(scale * q k^T + bias) v, over the keys the mask allows. Plain differentiable operations: any dtype, double
backward and forward-mode derivatives. It holds the whole (n_q, n_k) matrix.

Shapes: b batch, h heads, n_q queries, n_k keys, d features a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from volvelle.parts.attention.spec import LSEBackend, Shape, Spec, Terms
from volvelle.parts.position.encoding import Bias


def masked_softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Return softmax over the last dimension among the allowed entries; a row with none is 0, with gradient 0.

    >>> masked_softmax(torch.zeros(2, 2), torch.tensor([[True, True], [False, False]]))
    tensor([[0.5000, 0.5000],
            [0.0000, 0.0000]])
    """
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    # The largest score only guards exp against overflow, so it carries no gradient; where a whole row is -inf it is
    # replaced by a finite number, and exp gives 0 instead of NaN.
    largest = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)


class Reference(LSEBackend):
    """The written-out form: slow, in need of n_q * n_k memory, and right. fp16 and bf16 are computed in fp32."""

    name = "reference"

    def supports(self, spec: Spec) -> str | None:
        """Serve everything."""
        return None

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return (b, h, n_q, d_v) and log Σ_j exp(score_ij), (b, h, n_q), -inf where no key is allowed."""
        # half types are widened on purpose, which autocast would undo
        with torch.autocast(q.device.type, enabled=False):
            wide = torch.promote_types(q.dtype, torch.float32)
            dtype, group = q.dtype, shape.h // shape.h_kv
            bias = terms.whole_bias(q, k)
            q, k, v = q.to(wide), k.to(wide), v.to(wide)
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            scores = q @ k.transpose(-2, -1) * terms.scale
            if bias is not None:
                scores = scores + bias
            allowed = terms.allowed(shape, q.device)
            weights = masked_softmax(scores, allowed)
            lse = (scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)).logsumexp(-1)
            factors = terms.factors(shape, weights.dtype, q.device)
            if factors is not None:
                weights = weights * factors
            out = weights @ v
            if isinstance(terms.bias, Bias) and terms.bias.has_value_term:
                out = out + terms.bias.value_term(weights, *terms.positions(q, k))
            return out.to(dtype), lse
