"""Linear attention: φ(q) · φ(k) in place of exp(q · k), so that keys and values sum up in a state of fixed size.

    out_i = Σ_j (R_i φ(q_i)) · (R_j φ(k_j)) v_j / Σ_j φ(q_i) · φ(k_j),   φ(x) = elu(x) + 1
(Katharopoulos et al. 2020, equations 5 and 7; with rotary positions R in the numerator only, Su et al. 2021, equation
19: turned features may be negative, and a denominator made of them could vanish). Causally the sums run over j <= i;
S = Σ_j R_j φ(k_j) v_jᵀ and z = Σ_j φ(k_j) are then a recurrent state, d (d_v + 1) numbers a head for any length.

Shapes: b batch, h heads, n_q queries, n_k keys, d and d_v features a head, c tokens a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.position.encoding import PositionEncoding, Turning


def elu_plus_one(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1, positive (Katharopoulos et al. 2020, equation 7)."""
    return F.elu(x) + 1


class LinearState(NamedTuple):
    """What the tokens so far leave behind: S (b, h, d, d_v) and z (b, h, d)."""

    s: Tensor
    z: Tensor

    @classmethod
    def empty(cls, b: int, h: int, d: int, d_v: int, dtype: torch.dtype, device: torch.device | None = None):
        """The state before the first token."""
        return cls(
            torch.zeros(b, h, d, d_v, dtype=dtype, device=device), torch.zeros(b, h, d, dtype=dtype, device=device)
        )


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotation: Turning | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    state: None = None,
    features: Callable[[Tensor], Tensor] = elu_plus_one,
    chunk: int = 128,
    eps: float = 1e-6,
) -> Tensor: ...


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotation: Turning | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    state: LinearState,
    features: Callable[[Tensor], Tensor] = elu_plus_one,
    chunk: int = 128,
    eps: float = 1e-6,
) -> tuple[Tensor, LinearState]: ...


@export("functional.linear_attention")
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotation: Turning | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    state: LinearState | None = None,
    features: Callable[[Tensor], Tensor] = elu_plus_one,
    chunk: int = 128,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, LinearState]:
    """Return φ(q) · φ(k) attention in time and memory linear in the number of tokens.

    q is (b, h, n_q, d), k (b, h, n_k, d), v (b, h, n_k, d_v), in one floating dtype; the result is (b, h, n_q, d_v).
    `rotation`, what a position encoding prepares, turns the features in the numerator. `mask` (b, n_k) is bool, True =
    a real token. Causally (n_q = n_k) the text is cut into chunks of `chunk` tokens: inside one the (c, c) products are
    written out, between them the state goes on. With a `state` the call continues a text, causally, and returns the
    state behind it too: decoding one token needs no cache. `eps` is added to the denominator. fp16 and bf16 are
    computed in fp32. Raises ValueError on shapes that do not fit. Katharopoulos et al. 2020; Su et al. 2021, 3.3.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
    >>> whole = linear_attention(q, k, v, causal=True)
    >>> state, rows = LinearState.empty(1, 2, 8, 8, q.dtype), []
    >>> for i in range(5):
    ...     row, state = linear_attention(q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1], state=state)
    ...     rows.append(row)
    >>> torch.allclose(torch.cat(rows, 2), whole, atol=1e-5)
    True
    """
    causal = causal or state is not None
    _check(q, k, v, mask, causal, chunk)
    dtype = q.dtype
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(dtype, torch.float32)
        q, k, v = features(q.to(wide)), features(k.to(wide)), v.to(wide)
        if mask is not None:
            k, v = k.masked_fill(~mask[:, None, :, None], 0), v.masked_fill(~mask[:, None, :, None], 0)
        turned_q, turned_k = (q, k) if rotation is None else rotation(q, k)
        if not causal:
            below = torch.einsum("bhid,bhd->bhi", q, k.sum(2)) + eps
            return (turned_q @ (turned_k.mT @ v) / below[..., None]).to(dtype)
        before = state or LinearState.empty(q.shape[0], q.shape[1], q.shape[3], v.shape[3], wide, q.device)
        out, after = _causal((q, turned_q), (k, turned_k), v, before, chunk, eps)
        return out.to(dtype) if state is None else (out.to(dtype), after)


def _causal(
    queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], v: Tensor, state: LinearState, chunk: int, eps: float
) -> tuple[Tensor, LinearState]:
    """Queries and keys come as features, plain and turned."""
    (q, turned_q), (k, turned_k) = queries, keys
    s, z, parts = state.s, state.z, []
    for start in range(0, q.shape[2], chunk):
        part = slice(start, start + chunk)
        rows, columns, values = turned_q[:, :, part], turned_k[:, :, part], v[:, :, part]
        above = (rows @ columns.mT).tril() @ values + rows @ s
        sums = z[:, :, None] + k[:, :, part].cumsum(2)
        below = (q[:, :, part] * sums).sum(-1, keepdim=True) + eps
        parts.append(above / below)
        s, z = s + columns.mT @ values, sums[:, :, -1]
    return torch.cat(parts, 2) if parts else q.new_empty(*q.shape[:3], v.shape[3]), LinearState(s, z)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, chunk: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"linear_attention: {name} must have shape (b, h, n, d), got {tuple(x.shape)}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            "linear_attention: q (b, h, n_q, d), k (b, h, n_k, d) and v (b, h, n_k, d_v) must agree, "
            f"got q of {tuple(q.shape)}, k of {tuple(k.shape)}, v of {tuple(v.shape)}"
        )
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"linear_attention: causally there are as many queries as keys, got {q.shape[2]}, {k.shape[2]}"
        )
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (k.shape[0], k.shape[2])):
        raise ValueError(f"linear_attention: mask must be bool (b, n_k), got {mask.dtype} {tuple(mask.shape)}")
    if chunk < 1:
        raise ValueError(f"linear_attention: chunk must be at least 1, got {chunk}")


@export("nn.LinearAttention", twin=linear_attention)
class LinearAttention(nn.Module):
    """`linear_attention` with its options held; `position` turns the features.

    >>> import torch
    >>> q = torch.randn(2, 4, 3, 8)
    >>> torch.equal(LinearAttention(causal=True)(q, q, q), linear_attention(q, q, q, causal=True))
    True
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        position: PositionEncoding | None = None,
        chunk: int = 128,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.causal, self.position, self.chunk, self.eps = causal, position, chunk, eps

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Return `linear_attention(q, k, v, ...)`; `positions` (n,) or (b, n) default to 0 .. n - 1."""
        rotation = None
        if self.position is not None:
            if positions is None:
                positions = torch.arange(q.shape[2], device=q.device)
            wide = torch.promote_types(q.dtype, torch.float32)
            rotation = self.position.rotation(positions, wide)
        return linear_attention(
            q, k, v, rotation=rotation, causal=self.causal, mask=mask, chunk=self.chunk, eps=self.eps
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"causal={self.causal}, chunk={self.chunk}, eps={self.eps:g}"
