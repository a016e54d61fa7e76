"""What one attention call asks for: the facts a back end decides on, the terms it computes with, and the input checks.

Shapes: b batch, h query heads, h_kv key/value heads (h a multiple), n_q queries, n_k keys, d and d_v head widths.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from volvelle.parts.position.encoding import Bias


class Spec(NamedTuple):
    """The facts of one call, without its tensors: what a back end needs to say whether it can serve it."""

    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    n_q: int
    n_k: int
    d: int
    d_v: int
    causal: bool
    masked: bool
    bias: str  # "none", "tensor" or "object"
    bias_grad: bool
    value_term: bool


class Terms(NamedTuple):
    """What shapes the scores besides q and k; each back end reads the terms it needs.

    mask is bool and broadcasts to (b, h, n_q, n_k), True = may attend; bias is added to the scaled scores.
    """

    mask: Tensor | None
    bias: Tensor | Bias | None
    causal: bool
    scale: float
    q_positions: Tensor | None
    k_positions: Tensor | None

    def tile(self, q: Tensor, k: Tensor) -> Tensor | None:
        """Return the whole bias, (b or 1, h or 1, n_q, n_k) or broadcastable, in fp32 or q's wider type."""
        if not isinstance(self.bias, Bias):
            return self.bias
        q_positions, k_positions = self.positions(q, k)
        return self.bias.tile(q, k, q_positions, k_positions)

    def positions(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions given, or key j at j and the queries at the end of the keys, as `causal` aligns them."""
        n_q, n_k = q.shape[2], k.shape[2]
        k_positions = torch.arange(n_k, device=k.device) if self.k_positions is None else self.k_positions
        if self.q_positions is not None:
            return self.q_positions, k_positions
        return torch.arange(n_k - n_q, n_k, device=q.device), k_positions

    def allowed(self, q: Tensor, k: Tensor) -> Tensor | None:
        """Return the mask with `causal` merged in, or None where every query may attend to every key."""
        n_q, n_k = q.shape[2], k.shape[2]
        if not self.causal or (n_q == 1 and n_k >= 1):
            return self.mask
        seen = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q)
        return seen if self.mask is None else seen & self.mask


class Backend(Protocol):
    """One way to compute attention."""

    name: str

    def supports(self, spec: Spec) -> str | None:
        """Return None when this back end can serve the call, else the reason why not."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
        """Return (b, h, n_q, d_v)."""
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


def check_inputs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | Bias | None) -> None:
    """Raise ValueError or TypeError, naming the tensor, where shapes or dtypes do not fit together."""
    if not (q.dim() == k.dim() == v.dim() == 4):
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.dim() != 4:
                raise ValueError(f"attention: {name} must have shape (b, h, n, d), got {name} of {tuple(x.shape)}")
    b, h, n_q, d = q.shape
    k_b, h_kv, n_k, k_d = k.shape
    v_b, v_h, v_n, _ = v.shape
    if (k_b, k_d) != (b, d) or (v_b, v_h, v_n) != (b, h_kv, n_k):
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
    if isinstance(bias, Tensor):
        if not bias.is_floating_point():
            raise TypeError(f"attention: bias must be floating point, got {bias.dtype}; use mask for bool")
        _check_broadcast("bias", bias, (b, h, n_q, n_k))


def _check_broadcast(name: str, x: Tensor, full: tuple[int, int, int, int]) -> None:
    shape = x.shape
    if len(shape) > 4 or any(
        have not in {1, want} for have, want in zip(reversed(shape), reversed(full), strict=False)
    ):
        raise ValueError(f"attention: {name} must broadcast to (b, h, n_q, n_k) = {full}, got {name} of {tuple(shape)}")
