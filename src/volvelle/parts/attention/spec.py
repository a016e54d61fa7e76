"""What one attention call asks for: the facts a back end decides on, the terms it computes with, and the input checks.

Shapes: b batch, h query heads, h_kv key/value heads, n_q queries, n_k keys, d and d_v features a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from volvelle.parts.attention.segments import Segments
from volvelle.parts.attention.tiles import Dropout, Window, tile_side, visible
from volvelle.parts.position.encoding import Bias, DistanceBias


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
    """The facts of one call, without its tensors: what a back end needs to say whether it can serve it.

    `computed_bias`: the bias is a `Bias` that is no function of distance alone. `blockwise()`: it is that, or one by
    distance at positions with more than one distance on a diagonal, so that it must be asked block by block.
    `factored`: the bias is a product of two thin matrices (`Bias.factors`), which q and k can carry.
    `order`: how often the result will be differentiated backwards, 0 where no gradient is asked for; `tangents`:
    forward-mode derivatives are under way; `traced`: the call becomes part of a graph (torch.compile, torch.export).
    """

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
    segments: bool = False
    computed_bias: bool = False
    blockwise: Callable[[], bool] = bool  # no: bool() is False
    order: int = 0
    tangents: bool = False
    traced: bool = False
    factored: bool = False


class Terms(NamedTuple):
    """What shapes the scores besides q and k; each back end reads the terms it needs.

    mask is bool and broadcasts to (b, h, n_q, n_k), True = may attend; bias is added to the scaled scores; window is
    how many keys to the (left, right) of its own place a query sees, None = all; segments are those of a packed row.
    """

    mask: Tensor | None
    bias: Tensor | Bias | None
    causal: bool
    scale: float
    q_positions: Tensor | None
    k_positions: Tensor | None
    window: Window | None = None
    dropout: Dropout | None = None
    segments: Segments | None = None

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

    def factored(self, n_q: int, n_k: int) -> bool:
        """Whether q and k can carry the bias as further features (`Bias.factors`)."""
        default = self.q_positions is None and self.k_positions is None
        return isinstance(self.bias, Bias) and default and self.bias.rank(n_q, n_k) is not None

    def first_distance(self, q: Tensor, k: Tensor) -> int | None:
        """Return the distance from the first query to the last key, where distance is constant along every diagonal.

        Else None. In a packed row it need only be so inside each segment: there positions count up with the place.
        """
        n_q, n_k = q.shape[2], k.shape[2]
        if self.q_positions is None and self.k_positions is None:
            return 1 - n_q
        q_positions, k_positions = self.positions(q, k)
        if q_positions.dim() != 1 or k_positions.dim() != 1 or torch.compiler.is_compiling():  # which has no values
            return None
        if self.segments is not None:
            less = (
                q_positions - torch.arange(n_k - n_q, n_k, device=q.device),
                k_positions - torch.arange(n_k, device=k.device),
            )
            return 1 - n_q if self.segments.share(*less) else None
        in_step = bool((q_positions.diff() == 1).all()) and bool((k_positions.diff() == 1).all())
        return int(q_positions[0]) - int(k_positions[-1]) if in_step else None

    def diagonals(self, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return a bias by distance as one number a diagonal, (h or 1, n_q + n_k - 1), the lowest i - j first.

        None where the bias is another, or positions are such that a diagonal has more than one distance.
        """
        first = self.first_distance(q, k) if isinstance(self.bias, DistanceBias) and q.shape[2] else None
        if first is None or not isinstance(self.bias, DistanceBias):
            return None
        return self.bias.at(torch.arange(first, first + q.shape[2] + k.shape[2] - 1, device=q.device), dtype)

    def allowed(self, shape: Shape, device: torch.device) -> Tensor | None:
        """Return one mask of `mask`, `causal`, `window` and `segments`; None where every query may attend to all."""
        allowed = self.mask
        if self.window is not None or (self.causal and shape.n_q > 1):
            seen = visible(shape.n_q, shape.n_k, self.causal, self.window, device)
            allowed = seen if allowed is None else seen & allowed
        if self.segments is not None:
            same = self.segments.same()
            allowed = same if allowed is None else same & allowed
        return allowed

    @property
    def by_row(self) -> bool:
        """Whether tiles are cut for each row of the batch on its own, because rows are packed differently."""
        return self.segments is not None and self.segments.rows > 1

    def row(self, i: int) -> Terms:
        """The terms of one row of the batch."""
        mask, bias = self.mask, self.bias
        if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
            mask = mask[i : i + 1]
        if isinstance(bias, Tensor) and bias.dim() == 4 and bias.shape[0] > 1:
            bias = bias[i : i + 1]
        return self._replace(
            mask=mask,
            bias=bias,
            q_positions=_row(self.q_positions, i),
            k_positions=_row(self.k_positions, i),
            dropout=None if self.dropout is None else self.dropout.row(i),
            segments=None if self.segments is None else self.segments.row(i),
        )

    def factors(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return what dropout multiplies all weights (b, h, n_q, n_k) by: that of the tiled back end, put together.

        A traced graph cannot follow a seed and draws for itself.
        """
        if self.dropout is None:
            return None
        if torch.compiler.is_compiling():
            p, sizes = self.dropout.p, (shape.b, shape.h, shape.n_q, shape.n_k)
            return (torch.rand(sizes, device=device) >= p).to(dtype) * (1 / (1 - p) if p < 1 else 0.0)
        if self.by_row:
            one = shape._replace(b=1)
            rows = [self.row(i).factors(one, dtype, device) for i in range(shape.b)]
            return torch.cat([row for row in rows if row is not None])
        side = tile_side(shape.b, shape.h, self.causal, self.window)
        return self.dropout.whole(side, (shape.b, shape.h, shape.n_q, shape.n_k), dtype, device)


def spec_of(
    q: Tensor, k: Tensor, v: Tensor, terms: Terms, shape: Shape, derivatives: int = 1, lse: bool = False
) -> Spec:
    """Return the facts of a call; `derivatives` is how often its result will be differentiated if gradients are on."""
    bias, grad = terms.bias, torch.is_grad_enabled()
    asked = bias if isinstance(bias, Bias) else None
    learnable = grad and bias is not None and (bias.requires_grad if isinstance(bias, Tensor) else bias.learnable)
    differentiated = learnable or (grad and (q.requires_grad or k.requires_grad or v.requires_grad))
    computed = asked is not None and not isinstance(asked, DistanceBias)
    return Spec(
        shape, q.device.type, q.dtype, terms.causal, terms.mask is not None, bias is not None, learnable,
        asked is not None and asked.has_value_term, terms.window is not None, terms.dropout is not None, lse,
        terms.segments is not None, computed,
        lambda: computed or (asked is not None and terms.first_distance(q, k) is None),
        derivatives if differentiated else 0, _tangents(q, k, v, bias), torch.compiler.is_compiling(),
        terms.factored(shape.n_q, shape.n_k),
    )  # fmt: skip


def _tangents(*tensors: Tensor | Bias | None) -> bool:
    """Whether one of these carries a tangent, the derivative that forward mode passes on."""
    if torch.compiler.is_compiling():
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _row(positions: Tensor | None, i: int) -> Tensor | None:
    """Positions (n,) as they are, of (b or 1, n) those of row i."""
    if positions is None or positions.dim() == 1:
        return positions
    return positions[i if positions.shape[0] > 1 else 0]


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
    """A back end that can also give the log-sum-exp of each query's scores; a base for those that always have it."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms, shape: Shape) -> Tensor:
        """Return (b, h, n_q, d_v)."""
        return self.with_lse(q, k, v, terms, shape)[0]

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return (b, h, n_q, d_v), and log Σ_j exp(score_ij) (b, h, n_q), -inf where no key is allowed."""
        ...


@runtime_checkable
class Remarks(Protocol):
    """A back end that has something to say about how it serves a call."""

    def remark(self, spec: Spec) -> str:
        """Return one phrase for the explanation."""
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


def check_options(window: Window | None, dropout: float, derivatives: int) -> None:
    """Raise ValueError, naming the option, where one lies outside its range."""
    if window is not None and (len(window) != 2 or any(side is not None and side < 0 for side in window)):
        raise ValueError(f"attention: window must be (left, right), numbers of keys from 0 or None, got {window}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"attention: dropout must lie in [0, 1], got {dropout}")
    if derivatives not in {1, 2}:
        raise ValueError(f"attention: derivatives must be 1 or 2, got {derivatives}")


def only_once(backend: str) -> RuntimeError:
    """The error of a back end that is asked for a second derivative, which would otherwise be torch's or a silent 0."""
    return RuntimeError(
        f"attention: the {backend} back end has no second derivative; pass derivatives=2 for one that has"
    )


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
