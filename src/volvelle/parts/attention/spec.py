"""What one attention call asks for: the facts a back end decides on, the terms it computes with, and the input checks.

Shapes: b batch, h query heads, h_kv key/value heads, n_q queries, n_k keys, d and d_v features a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from volvelle.parts.attention.tiles import Dropout, Window, visible
from volvelle.parts.position.encoding import Bias


class Shape(NamedTuple):
    """The sizes of one call."""

    b: int
    h: int
    h_kv: int
    n_q: int
    n_k: int
    d: int
    d_v: int


class Spec(NamedTuple):
    """The facts of one call, without its tensors: what a back end needs to say whether it can serve it."""

    shape: Shape
    device: str
    dtype: torch.dtype
    causal: bool
    masked: bool
    biased: bool
    learnable_bias: bool
    value_term: bool
    window: bool = False
    dropout: bool = False
    lse: bool = False


class Terms(NamedTuple):
    """What shapes the scores besides q and k; each back end reads the terms it needs.

    mask is bool and broadcasts to (b, h, n_q, n_k), True = may attend; bias is added to the scaled scores; window is
    how many keys to the (left, right) of its own place a query sees, None = all.
    """

    mask: Tensor | None
    bias: Tensor | Bias | None
    causal: bool
    scale: float
    q_positions: Tensor | None
    k_positions: Tensor | None
    window: Window | None = None
    dropout: Dropout | None = None

    def positions(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions given, or key j at j and the queries at the end of the keys, as `causal` aligns them."""
        n_q, n_k = q.shape[2], k.shape[2]
        k_positions = torch.arange(n_k, device=k.device) if self.k_positions is None else self.k_positions
        if self.q_positions is not None:
            return self.q_positions, k_positions
        return torch.arange(n_k - n_q, n_k, device=q.device), k_positions

    def whole_bias(self, q: Tensor, k: Tensor) -> Tensor | None:
        """Return the bias of all queries against all keys, broadcastable to (b, h, n_q, n_k)."""
        if isinstance(self.bias, Bias):
            return self.bias.tile(q, k, *self.positions(q, k))
        return self.bias

    def allowed(self, shape: Shape, device: torch.device) -> Tensor | None:
        """Return the mask with `causal` and `window` merged in, or None where every query may attend to every key."""
        if self.window is None and (not self.causal or shape.n_q == 1):
            return self.mask
        seen = visible(shape.n_q, shape.n_k, self.causal, self.window, device)
        return seen if self.mask is None else seen & self.mask


class Backend(Protocol):
    """One way to compute attention."""

    name: str

    def supports(self, spec: Spec) -> str | None:
        """Return None when this back end can serve the call, else the reason why not."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms, shape: Shape) -> Tensor:
        """Return (b, h, n_q, d_v)."""
        ...


class LSEBackend(Backend, Protocol):
    """A back end that can also give the log-sum-exp of each query's scores."""

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return (b, h, n_q, d_v), and log Σ_j exp(score_ij) (b, h, n_q), -inf where no key is allowed."""
        ...


@dataclass(frozen=True)
class Explanation:
    """Which back end served a call and why; `rejected` maps the others that were asked to their reasons."""

    backend: str
    why: str
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rejected = "".join(f"; not {name}: {reason}" for name, reason in self.rejected.items())
        return f"{self.backend}: {self.why}{rejected}"


def check_inputs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | Bias | None) -> Shape:
    """Return the sizes; raise ValueError or TypeError, naming the tensor, where shapes or dtypes do not fit."""
    if not (q.dim() == k.dim() == v.dim() == 4):
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.dim() != 4:
                raise ValueError(f"attention: {name} must have shape (b, h, n, d), got {name} of {tuple(x.shape)}")
    b, h, n_q, d = q.shape
    k_b, h_kv, n_k, k_d = k.shape
    v_b, v_h, v_n, d_v = v.shape
    if k_b != b or k_d != d or v_b != b or v_h != h_kv or v_n != n_k:
        raise ValueError(
            "attention: q (b, h, n_q, d), k (b, h_kv, n_k, d) and v (b, h_kv, n_k, d_v) must agree, "
            f"got q of {tuple(q.shape)}, k of {tuple(k.shape)}, v of {tuple(v.shape)}"
        )
    if h != h_kv and (h_kv == 0 or h % h_kv):
        raise ValueError(f"attention: the {h} heads of q must be a multiple of the {h_kv} heads of k and v")
    if n_k == 0:
        raise ValueError(f"attention: k must hold at least one key, got k of {tuple(k.shape)}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise TypeError(
            f"attention: q, k and v must share one floating-point dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"attention: mask must be bool (True = may attend), got {mask.dtype}; use bias for floats")
        _check_broadcast("mask", mask, (b, h, n_q, n_k))
    if bias is not None and not isinstance(bias, Bias):
        if not bias.is_floating_point():
            raise TypeError(f"attention: bias must be floating point, got {bias.dtype}; use mask for bool")
        _check_broadcast("bias", bias, (b, h, n_q, n_k))
    return Shape(b, h, h_kv, n_q, n_k, d, d_v)


def _check_broadcast(name: str, x: Tensor, full: tuple[int, int, int, int]) -> None:
    shape = x.shape
    if len(shape) == 4:  # the usual case, which a decoding step meets in every layer
        b, h, n_q, n_k = full
        s_b, s_h, s_q, s_k = shape
        if (s_k == n_k or s_k == 1) and (s_q == n_q or s_q == 1) and (s_h == h or s_h == 1) and (s_b == b or s_b == 1):
            return
    elif len(shape) < 4 and all(have in {1, want} for have, want in zip(reversed(shape), reversed(full), strict=False)):
        return
    raise ValueError(f"attention: {name} must broadcast to (b, h, n_q, n_k) = {full}, got {name} of {tuple(shape)}")
