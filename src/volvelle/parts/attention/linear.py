"""Linear attention: φ(q) · φ(k) in place of exp(q · k), so that keys and values sum up in a state of fixed size.

    out_i = Σ_j (R_i φ(q_i)) · (R_j φ(k_j)) v_j / Σ_j φ(q_i) · φ(k_j),   φ(x) = elu(x) + 1
(Katharopoulos et al. 2020, equations 5 and 7; with rotary positions R in the numerator only, Su et al. 2021, equation
19: turned features may be negative, and a denominator made of them could vanish). Causally the sums run over j <= i;
S = Σ_j R_j φ(k_j) v_jᵀ and z = Σ_j φ(k_j) are then a recurrent state, d (d_v + 1) numbers a head for any length.

Shapes: b batch, h query heads, h_kv key/value heads, g = h / h_kv queries a group, n_q queries, n_k keys, d and d_v
features a head, c tokens a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.position.encoding import PositionEncoding, Turning

FeatureMap = Callable[[Tensor], Tensor]


def elu_plus_one(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1, positive (Katharopoulos et al. 2020, equation 7)."""
    return F.elu(x) + 1


class LinearState(NamedTuple):
    """What the tokens so far leave behind: S (b, h_kv, d, d_v) and z (b, h_kv, d)."""

    s: Tensor
    z: Tensor

    @classmethod
    def empty(
        cls, b: int, h: int, d: int, d_v: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> LinearState:
        """The state before the first token."""
        return cls(
            torch.zeros(b, h, d, d_v, dtype=dtype, device=device), torch.zeros(b, h, d, dtype=dtype, device=device)
        )

    def after(
        self,
        k: Tensor,
        v: Tensor,
        *,
        rotation: Turning | None = None,
        mask: Tensor | None = None,
        features: FeatureMap = elu_plus_one,
    ) -> LinearState:
        """The state behind further tokens, those that `mask` (b, n) marks with True, or all.

        k is (b, h_kv, n, d), v (b, h_kv, n, d_v); the other arguments are those of `linear_attention`. A sum knows no
        order, so any selection of tokens whose positions are already in `rotation` may be taken in.
        """
        with torch.autocast(k.device.type, enabled=False):
            plain, turned = _features(k, rotation, features)
            if mask is not None:
                gone = ~mask[:, None, :, None]
                plain, turned, v = (x.masked_fill(gone, 0) for x in (plain, turned, v))
            return LinearState(self.s + turned.mT @ v.to(turned.dtype), self.z + plain.sum(2))


class _Both(NamedTuple):
    """Features as they are, for the denominator, and turned by position, for the numerator."""

    plain: Tensor
    turned: Tensor

    def part(self, part: slice) -> _Both:
        """Those of some tokens."""
        return _Both(self.plain[..., part, :], self.turned[..., part, :])


def _features(x: Tensor, rotation: Turning | None, features: FeatureMap) -> _Both:
    """φ(x) and R φ(x), in fp32 at least."""
    plain = features(x.to(torch.promote_types(x.dtype, torch.float32)))
    return _Both(plain, plain if rotation is None else rotation.turn(plain))


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotation: Turning | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    state: None = None,
    features: FeatureMap = elu_plus_one,
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
    segments: Tensor | None = None,
    state: LinearState,
    features: FeatureMap = elu_plus_one,
    chunk: int = 128,
    eps: float = 1e-6,
) -> tuple[Tensor, LinearState]: ...


@export("functional.linear_attention", stable=True)
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotation: Turning | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    state: LinearState | None = None,
    features: FeatureMap = elu_plus_one,
    chunk: int = 128,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, LinearState]:
    """Return φ(q) · φ(k) attention in time and memory linear in the number of tokens.

    q is (b, h, n_q, d), k (b, h_kv, n_k, d), v (b, h_kv, n_k, d_v), in one floating dtype, h a multiple of h_kv; the
    result is (b, h, n_q, d_v). `rotation`, what a position encoding prepares, turns the features in the numerator.
    `mask` is bool: (b or 1, n_k), True = a real token, or (b or 1, n_q, n_k), True = may attend, which replaces causal
    order (a token tree) and is written out, in memory n_q n_k.
    Causally (n_q = n_k) the text is cut into chunks of `chunk` tokens: inside one the (c, c) products are written out,
    between them the state goes on. `segments` (b or 1, n) are integers, equal ones side by side: causally a token sees
    those of its own segment only. With a `state` the call continues a text, causally, and returns the state behind all
    its real tokens too: decoding one token needs no cache. `eps` is added to the denominator. fp16 and bf16 are
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
    _check(q, k, v, causal, chunk)
    _check_masks(q, k, mask, segments, causal, state)
    dtype, heads = q.dtype, (k.shape[1], -1)
    with torch.autocast(q.device.type, enabled=False):
        queries, keys = _features(q, rotation, features), _features(k, rotation, features)
        v = v.to(keys.plain.dtype)
        if mask is not None and mask.dim() == 2:
            gone = ~mask[:, None, :, None]
            keys, v = _Both(*(x.masked_fill(gone, 0) for x in keys)), v.masked_fill(gone, 0)
        # a group of queries shares its keys: (b, h_kv, g, n, d) against (b, h_kv, 1, n, d)
        queries = _Both(*(x.unflatten(1, heads) for x in queries))
        keys, v = _Both(*(x.unsqueeze(2) for x in keys)), v.unsqueeze(2)
        before = _before(state, keys, v)
        if mask is not None and mask.dim() == 3:
            out, after = _written_out(queries, keys, v, mask, before, eps)
        elif segments is not None:
            out, after = _within_segments(queries, keys, v, segments, chunk, eps), before
        elif causal:
            out, after = _causal(queries, keys, v, before, chunk, eps)
        else:
            below = queries.plain @ keys.plain.sum(-2).unsqueeze(-1) + eps
            out, after = queries.turned @ (keys.turned.mT @ v) / below, before
        out = out.flatten(1, 2).to(dtype)
    return out if state is None else (out, LinearState(after.s.squeeze(2), after.z.squeeze(2)))


def _before(state: LinearState | None, keys: _Both, v: Tensor) -> LinearState:
    """The state that a call begins with, (b, h_kv, 1, d, d_v) and (b, h_kv, 1, d)."""
    if state is not None:
        return LinearState(state.s.unsqueeze(2), state.z.unsqueeze(2))
    b, h_kv, _, _, d = keys.plain.shape
    return LinearState(v.new_zeros(b, h_kv, 1, d, v.shape[-1]), v.new_zeros(b, h_kv, 1, d))


def _causal(
    queries: _Both, keys: _Both, v: Tensor, state: LinearState, chunk: int, eps: float
) -> tuple[Tensor, LinearState]:
    """Each token sees those before it and itself."""
    (s, z), parts = state, []
    if v.shape[-2] == 1:  # a step of decoding: what the token sees is the state behind it
        s, z = s + keys.turned.mT @ v, z + keys.plain.squeeze(-2)
        below = (queries.plain * z.unsqueeze(-2)).sum(-1, keepdim=True) + eps
        return queries.turned @ s / below, LinearState(s, z)
    for start in range(0, v.shape[-2], chunk):
        part = slice(start, start + chunk)
        q, k, values = queries.part(part), keys.part(part), v[..., part, :]
        above = (q.turned @ k.turned.mT).tril() @ values + q.turned @ s
        sums = z.unsqueeze(-2) + k.plain.cumsum(-2)
        below = (q.plain * sums).sum(-1, keepdim=True) + eps
        parts.append(above / below)
        s, z = s + k.turned.mT @ values, sums[..., -1, :]
    return _joined(parts, queries, v), LinearState(s, z)


def _within_segments(queries: _Both, keys: _Both, v: Tensor, segments: Tensor, chunk: int, eps: float) -> Tensor:
    """As `_causal`, with a state that is dropped where its segment ends."""
    (s, z), parts, owner = _before(None, keys, v), [], segments[:, :1]  # owner (b, 1): whose tokens the state holds
    for start in range(0, v.shape[-2], chunk):
        part = slice(start, start + chunk)
        q, k, values, own = queries.part(part), keys.part(part), v[..., part, :], segments[:, part]
        apart = ~(own[:, :, None] == own[:, None, :]).tril()[:, None, None]  # (b, 1, 1, c, c)
        ended = (own != owner)[:, None, None, :, None]  # (b, 1, 1, c, 1)
        above = (q.turned @ k.turned.mT).masked_fill(apart, 0) @ values + (q.turned @ s).masked_fill(ended, 0)
        below = (q.plain @ k.plain.mT).masked_fill(apart, 0).sum(-1, keepdim=True)
        below = below + (q.plain @ z.unsqueeze(-1)).masked_fill(ended, 0)
        parts.append(above / (below + eps))
        last = own[:, -1:]
        over, past = (owner != last)[:, None, None, :, None], (own != last)[:, None, None, :, None]
        s = s.masked_fill(over, 0) + k.turned.masked_fill(past, 0).mT @ values
        z = z.masked_fill(over[..., 0], 0) + k.plain.masked_fill(past, 0).sum(-2)
        owner = last
    return _joined(parts, queries, v)


def _written_out(
    queries: _Both, keys: _Both, v: Tensor, seen: Tensor, state: LinearState, eps: float
) -> tuple[Tensor, LinearState]:
    """Each query sees the state and the keys that `seen` (b or 1, n_q, n_k) allows; the state takes in all of them."""
    hidden = ~seen[:, None, None]
    above = (queries.turned @ keys.turned.mT).masked_fill(hidden, 0) @ v + queries.turned @ state.s
    below = (queries.plain @ keys.plain.mT).masked_fill(hidden, 0).sum(-1, keepdim=True)
    below = below + queries.plain @ state.z.unsqueeze(-1) + eps
    after = LinearState(state.s + keys.turned.mT @ v, state.z + keys.plain.sum(-2))
    return above / below, after


def _joined(parts: list[Tensor], queries: _Both, v: Tensor) -> Tensor:
    return torch.cat(parts, -2) if parts else v.new_empty(*queries.plain.shape[:-1], v.shape[-1])


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, chunk: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"linear_attention: {name} must have shape (b, h, n, d), got {tuple(x.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            "linear_attention: q (b, h, n_q, d), k (b, h_kv, n_k, d) and v (b, h_kv, n_k, d_v) must agree, "
            f"got q of {tuple(q.shape)}, k of {tuple(k.shape)}, v of {tuple(v.shape)}"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"linear_attention: the {q.shape[1]} heads of q must be a multiple of the {k.shape[1]} heads of k and v"
        )
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"linear_attention: causally there are as many queries as keys, got {q.shape[2]}, {k.shape[2]}"
        )
    if chunk < 1:
        raise ValueError(f"linear_attention: chunk must be at least 1, got {chunk}")


def _check_masks(
    q: Tensor, k: Tensor, mask: Tensor | None, segments: Tensor | None, causal: bool, state: LinearState | None
) -> None:
    b, n_q, n_k = q.shape[0], q.shape[2], k.shape[2]
    shapes = {(b, n_k), (1, n_k), (b, n_q, n_k), (1, n_q, n_k)}
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) not in shapes):
        raise ValueError(
            f"linear_attention: mask must be bool (b, n_k) or (b, n_q, n_k), got {mask.dtype} {tuple(mask.shape)}"
        )
    if segments is None:
        return
    if not causal or state is not None or (mask is not None and mask.dim() == 3):
        raise ValueError("linear_attention: segments go with causal order, and with no state and no mask of pairs")
    if segments.is_floating_point() or tuple(segments.shape) not in {(b, n_k), (1, n_k)}:
        raise ValueError(
            f"linear_attention: segments must be integers (b or 1, n), got {segments.dtype} {tuple(segments.shape)}"
        )


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
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return `linear_attention(q, k, v, ...)`; `positions` (n,) or (b, n) default to 0 .. n - 1."""
        rotation = None
        if self.position is not None:
            if positions is None:
                positions = torch.arange(q.shape[2], device=q.device)
            wide = torch.promote_types(q.dtype, torch.float32)
            rotation = self.position.rotation(positions, wide)
        return linear_attention(
            q,
            k,
            v,
            rotation=rotation,
            causal=self.causal,
            mask=mask,
            segments=segments,
            chunk=self.chunk,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"causal={self.causal}, chunk={self.chunk}, eps={self.eps:g}"
