"""One attention function over several back ends.

out_i = Σ_j p_ij v_j,  p_i = softmax_j(scale * q_i · k_j + bias_ij) over the keys j that i may attend to
(Vaswani et al. 2017, section 3.2.1; grouped queries: Ainslie et al. 2023). A query that may attend to nothing gives 0.

Shapes: b batch, h query heads, h_kv key/value heads, n_q queries, n_k keys, d and d_v features a head.
"""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, cast, overload

import torch
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.attention.flex import Flex
from volvelle.parts.attention.reference import Reference
from volvelle.parts.attention.sdpa import SDPA
from volvelle.parts.attention.segments import Segmentation, Segments
from volvelle.parts.attention.spec import (
    Backend,
    Explanation,
    LSEBackend,
    Remarks,
    Spec,
    Terms,
    check_inputs,
    check_options,
    spec_of,
)
from volvelle.parts.attention.tiled import Tiled
from volvelle.parts.attention.tiles import Dropout, Window
from volvelle.parts.attention.triton import INTERPRETED, Triton
from volvelle.parts.position.encoding import Bias, PositionEncoding

# The interpreter of Triton serves tensors of the CPU too, but only when the back end is asked for by name.
_KERNELS = (Tiled(), Triton()) if INTERPRETED else (Triton(), Tiled())
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (SDPA(), *_KERNELS, Reference(), Flex())}
"""The back ends in the order in which `backend="auto"` asks them; the reference serves all, one behind it by name."""


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
    if isinstance(chosen, Remarks):
        why = f"{why}; {chosen.remark(spec)}"
    return Explanation(chosen.name, why, _rejections(spec))


class Options(TypedDict, total=False):
    """The options of `attention` that do not change what it returns, for the type checker."""

    mask: Tensor | None
    bias: Tensor | Bias | None
    causal: bool
    window: Window | None
    segments: Segmentation | None
    dropout: float
    scale: float | None
    q_positions: Tensor | None
    k_positions: Tensor | None
    backend: str
    derivatives: int


Yes = Literal[True]
No = Literal[False]


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: No = False, explain: No = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Yes, explain: No = False, **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: No = False, explain: Yes, **options: Unpack[Options]
) -> tuple[Tensor, Explanation]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Yes, explain: Yes, **options: Unpack[Options]
) -> tuple[Tensor, Tensor, Explanation]: ...
@export("functional.attention", stable=True)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | Bias | None = None,
    causal: bool = False,
    window: Window | None = None,
    segments: Segmentation | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    backend: str = "auto",
    derivatives: int = 1,
    return_lse: bool = False,
    explain: bool = False,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Explanation] | tuple[Tensor, Tensor, Explanation]:
    """Return softmax(scale * q k^T + bias) v over the keys that each query may attend to.

    q is (b, h, n_q, d), k (b, h_kv, n_k, d) and v (b, h_kv, n_k, d_v), in one floating-point dtype, h a multiple of
    h_kv; the result is (b, h, n_q, d_v). `mask` is bool and broadcasts to (b, h, n_q, n_k), True = may attend.
    `causal` is aligned to the end: query i sees key j iff j <= i + n_k - n_q. `bias` is a float tensor that broadcasts
    likewise, or a `Bias`, which is asked at q_positions and k_positions (default: keys 0 .. n_k - 1, the queries
    last). `window` = (left, right) hides keys further than that from a query's own place, which is aligned like causal
    order; None = no limit. `segments`, integers (b or 1, n_k), or a pair of (b or 1, n_q) and (b or 1, n_k), packs
    several texts into a row: a query sees keys of an equal number; one tensor stands for keys and, by its last n_q,
    queries. `dropout` is the share of attention weights set to 0, the others grow by 1 / (1 - dropout);
    the mask follows from a seed taken from torch's global generator and is never stored whole.
    `scale` defaults to the bias's own or 1 / sqrt(d). A query with nothing to attend to gives 0, with gradient 0.
    Under autocast q, k and v are cast to its dtype, fp64 excepted.
    `backend` is "auto" or a name in the table; `derivatives` = 2 asks for one whose gradients have gradients. With
    `return_lse` the result comes with the log-sum-exp of each query's scores, (b, h, n_q) in at least fp32, -inf where
    nothing is allowed; with `explain`, with an `Explanation` behind it.
    Raises ValueError or TypeError on tensors that do not fit, ValueError when the named back end cannot serve.
    Vaswani et al. 2017, section 3.2.1.

    >>> import torch
    >>> q, k = torch.ones(1, 4, 2, 8), torch.ones(1, 2, 3, 8)
    >>> out, why = attention(q, k, k, causal=True, explain=True)
    >>> tuple(out.shape), why.backend, why.why
    ((1, 4, 2, 8), 'sdpa', 'the first in the order of preference that serves the call')
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)  # as autocast does for torch's own attention
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    shape = check_inputs(q, k, v, mask, bias)
    check_options(window, dropout, derivatives)
    if scale is None:
        scale = bias.scale if isinstance(bias, Bias) else None
    terms = Terms(
        mask, bias, causal, shape.d**-0.5 if scale is None else scale, q_positions, k_positions, window,
        Dropout.draw(dropout) if dropout > 0 else None,
        None if segments is None else Segments.of(segments, (shape.b, shape.n_q, shape.n_k)),
    )  # fmt: skip
    spec = spec_of(q, k, v, terms, shape, derivatives, return_lse)
    chosen = _choose(spec, backend)
    if return_lse:
        out, lse = cast(LSEBackend, chosen).with_lse(q, k, v, terms, shape)
        return (out, lse, _explain(spec, backend, chosen)) if explain else (out, lse)
    out = chosen(q, k, v, terms, shape)
    return (out, _explain(spec, backend, chosen)) if explain else out


@export("nn.Attention", twin=attention, stable=True)
class Attention(nn.Module):
    """`attention` with its options held; `position` supplies the score bias of a position encoding.

    Dropout acts in training mode only.

    >>> import torch
    >>> q = torch.randn(2, 4, 3, 8)
    >>> torch.equal(Attention(causal=True)(q, q, q), attention(q, q, q, causal=True))
    True
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        window: Window | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        backend: str = "auto",
        position: PositionEncoding | None = None,
        derivatives: int = 1,
    ) -> None:
        super().__init__()
        self.causal, self.window, self.dropout, self.scale = causal, window, dropout, scale
        self.backend, self.position, self.derivatives = backend, position, derivatives

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        segments: Segmentation | None = None,
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
            window=self.window,
            segments=segments,
            dropout=self.dropout if self.training else 0.0,
            scale=self.scale,
            q_positions=q_positions,
            k_positions=k_positions,
            backend=self.backend,
            derivatives=self.derivatives,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        names = ("causal", "window", "dropout", "scale", "backend", "derivatives")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
