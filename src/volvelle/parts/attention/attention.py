"""One attention function over several back ends.

out_i = Σ_j p_ij v_j,  p_i = softmax_j(scale * q_i · k_j + bias_ij) over the keys j that i may attend to
(Vaswani et al. 2017, section 3.2.1; grouped queries: Ainslie et al. 2023). A query that may attend to nothing gives 0.

Shapes: b batch, h query heads, h_kv key/value heads, n_q queries, n_k keys, d and d_v features a head.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.attention.reference import Reference
from volvelle.parts.attention.sdpa import SDPA
from volvelle.parts.attention.spec import Backend, Explanation, Spec, Terms, check_inputs
from volvelle.parts.position.encoding import Bias, PositionEncoding

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (SDPA(), Reference())}
"""The back ends in the order in which `backend="auto"` asks them."""


def _choose(spec: Spec, backend: str) -> Backend:
    if backend == "auto":
        for candidate in BACKENDS.values():
            if candidate.supports(spec) is None:
                return candidate
        raise ValueError(f"attention: no back end serves this call: {_rejections(spec)}")
    chosen = BACKENDS.get(backend)
    if chosen is None:
        raise ValueError(f"attention: backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    reason = chosen.supports(spec)
    if reason is not None:
        raise ValueError(f"attention: back end {backend!r} cannot serve this call: {reason}")
    return chosen


def _rejections(spec: Spec) -> dict[str, str]:
    reasons = {name: candidate.supports(spec) for name, candidate in BACKENDS.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _explain(spec: Spec, backend: str, chosen: Backend) -> Explanation:
    why = "asked for by name" if backend != "auto" else "the first in the order of preference that serves the call"
    return Explanation(chosen.name, why, _rejections(spec))


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | Bias | None = None,
    causal: bool = False,
    scale: float | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    backend: str = "auto",
    explain: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | Bias | None = None,
    causal: bool = False,
    scale: float | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    backend: str = "auto",
    explain: Literal[True],
) -> tuple[Tensor, Explanation]: ...


@export("functional.attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | Bias | None = None,
    causal: bool = False,
    scale: float | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    backend: str = "auto",
    explain: bool = False,
) -> Tensor | tuple[Tensor, Explanation]:
    """Return softmax(scale * q k^T + bias) v over the keys that each query may attend to.

    q is (b, h, n_q, d), k (b, h_kv, n_k, d) and v (b, h_kv, n_k, d_v), in one floating-point dtype, h a multiple of
    h_kv; the result is (b, h, n_q, d_v). `mask` is bool and broadcasts to (b, h, n_q, n_k), True = may attend.
    `causal` is aligned to the end: query i sees key j iff j <= i + n_k - n_q. `bias` is a float tensor that broadcasts
    likewise, or a `Bias`, which is asked at q_positions and k_positions (default: keys 0 .. n_k - 1, the queries
    last). `scale` defaults to 1 / sqrt(d). A query with nothing to attend to gives 0, with gradient 0.
    Under autocast q, k and v are cast to its dtype, fp64 excepted.
    `backend` is "auto" or a name in the table ("reference" has second and forward-mode derivatives, torch's fused
    kernels raise); with `explain` the result comes with an `Explanation`.
    Raises ValueError or TypeError on tensors that do not fit, ValueError when the named back end cannot serve.
    Vaswani et al. 2017, section 3.2.1.

    >>> import torch
    >>> q, k = torch.ones(1, 4, 2, 8), torch.ones(1, 2, 3, 8)
    >>> out, why = attention(q, k, k, causal=True, explain=True)
    >>> tuple(out.shape), str(why)
    ((1, 4, 2, 8), 'sdpa: the first in the order of preference that serves the call')
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)  # as autocast does for torch's own attention
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    shape = check_inputs(q, k, v, mask, bias)
    if isinstance(bias, Bias):
        learnable, value_term = bias.learnable, bias.has_value_term
    else:
        learnable, value_term = bias is not None and bias.requires_grad, False
    spec = Spec(shape, q.device.type, q.dtype, causal, mask is not None, bias is not None, learnable, value_term)
    chosen = _choose(spec, backend)
    terms = Terms(mask, bias, causal, shape.d**-0.5 if scale is None else scale, q_positions, k_positions)
    out = chosen(q, k, v, terms, shape)
    return (out, _explain(spec, backend, chosen)) if explain else out


@export("nn.Attention", twin=attention)
class Attention(nn.Module):
    """`attention` with its options held; `position` supplies the score bias of a position encoding.

    >>> import torch
    >>> q = torch.randn(2, 4, 3, 8)
    >>> torch.equal(Attention(causal=True)(q, q, q), attention(q, q, q, causal=True))
    True
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        scale: float | None = None,
        backend: str = "auto",
        position: PositionEncoding | None = None,
    ) -> None:
        super().__init__()
        self.causal, self.scale, self.backend, self.position = causal, scale, backend, position

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        q_positions: Tensor | None = None,
        k_positions: Tensor | None = None,
    ) -> Tensor:
        """Return `attention(q, k, v, ...)` with the options of this module."""
        return attention(
            q,
            k,
            v,
            mask=mask,
            bias=None if self.position is None else self.position.bias(),
            causal=self.causal,
            scale=self.scale,
            q_positions=q_positions,
            k_positions=k_positions,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"causal={self.causal}, scale={self.scale}, backend={self.backend!r}"
