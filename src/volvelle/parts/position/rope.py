"""Rotary position embedding, RoPE (Su et al. 2021, "RoFormer", section 3.2).

A pair of features (x_1, x_2) of the token at position m turns by the angle m θ_i:
    x_1' = x_1 cos mθ_i - x_2 sin mθ_i
    x_2' = x_2 cos mθ_i + x_1 sin mθ_i        θ_i = base^(-2i/dim)
so that q_m · k_n depends on the positions only through m - n.

Which features make a pair is the layout. "half" (GPT-NeoX, Hugging Face's Llama): x[i] with x[i + dim/2].
"interleaved" (RoFormer, GPT-J, Meta's Llama): x[2i] with x[2i + 1]. The two differ by a permutation of the q and k
projections, which `convert_rope_layout` applies; using the wrong one runs without an error and gives a bad model.

Angles are computed in fp64 for the positions at hand and cast last: no table to grow, no buffer that .to(bfloat16)
can spoil (a bf16 frequency is wrong by a whole turn at position 2,000).

Shapes: b batch, h heads, n tokens, d features a head, r <= d rotated features.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from volvelle.export import export
from volvelle.parts.position.encoding import PositionEncoding, moved
from volvelle.parts.position.rope_scaling import Scaling, plain_frequencies

Layout = Literal["half", "interleaved"]


class Rotation(NamedTuple):
    """Cosines and signed sines of one step's positions, ready for the q and k of every layer.

    `cos` and `sin` are (n, r) or (b, 1, n, r), repeated over both features of a pair; `sin` carries the minus sign of
    the first feature, so that turning is x * cos + swapped(x) * sin: three kernels.
    """

    cos: Tensor
    sin: Tensor
    layout: Layout

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Turn q (b, h, n, d) and k (b, h_kv, n, d)."""
        return self.turn(q), self.turn(k)

    def turn(self, x: Tensor) -> Tensor:
        """Turn one tensor (b, h, n, d): queries, keys, values, or several of them joined along h."""
        r = self.cos.shape[-1]
        if r == x.shape[-1]:
            return self._turn(x)
        return torch.cat((self._turn(x[..., :r]), x[..., r:]), dim=-1)

    def _turn(self, x: Tensor) -> Tensor:
        if self.layout == "half":
            swapped = x.roll(x.shape[-1] // 2, -1)
        else:
            swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        turned = torch.addcmul(x * self.cos, swapped, self.sin)
        return turned if turned.dtype == x.dtype else turned.to(x.dtype)


@export("functional.rope_frequencies", stable=True)
def rope_frequencies(
    dim: int, *, base: float = 10000.0, scaling: Scaling | None = None, length: Tensor | None = None
) -> Tensor:
    """Return the angle per position of each pair, θ_i = base^(-2i/dim), stretched by `scaling`.

    dim is the number of rotated features; the result is fp64 of shape (dim / 2,), in radians a token. `length`
    (largest position + 1, an integer tensor) is used by the scalings that depend on it (rope_scaling.py lists all).
    Raises ValueError when dim is odd or not positive. Su et al. 2021, section 3.2.2.

    >>> rope_frequencies(4)
    tensor([1.0000, 0.0100], dtype=torch.float64)
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"rope_frequencies: dim must be even and positive, got {dim}")
    if scaling is None:
        return plain_frequencies(dim, base)
    return scaling.frequencies(dim, base, length)


def rope_rotation(
    positions: Tensor, frequencies: Tensor, dtype: torch.dtype, *, layout: Layout = "half", factor: float = 1.0
) -> Rotation:
    """Prepare cos mθ_i and sin mθ_i for positions m, (n,) or (b, n), and fp64 frequencies θ, (r / 2,).

    The angle is taken in fp64 and cast to `dtype` last, so it is exact at position 1,000,000 too. `factor` multiplies
    both (a scaling's attention factor).

    >>> rotation = rope_rotation(torch.arange(2), rope_frequencies(2), torch.float64)
    >>> rotation.cos
    tensor([[1.0000, 1.0000],
            [0.5403, 0.5403]], dtype=torch.float64)
    """
    if positions.dim() not in {1, 2} or positions.is_floating_point():
        raise ValueError(
            "rope_rotation: positions must be integers of shape (n,) or (b, n), "
            f"got {positions.dtype} of shape {tuple(positions.shape)}"
        )
    home = positions.device
    if home.type == "mps":  # has no fp64: the small table is made on the CPU
        positions, frequencies = positions.cpu(), frequencies.cpu()
    angle = positions.unsqueeze(-1) * frequencies.to(positions.device)  # (n, r/2) or (b, n, r/2)
    return rope_rotation_of_angles(angle, dtype, home, layout=layout, factor=factor)


def rope_rotation_of_angles(
    angle: Tensor, dtype: torch.dtype, device: torch.device, *, layout: Layout = "half", factor: float = 1.0
) -> Rotation:
    """Prepare the turning of each pair by its fp64 angle, (n, r / 2) or (b, n, r / 2), on `device` in `dtype`.

    >>> rope_rotation_of_angles(torch.zeros(1, 1).double(), torch.float32, torch.device("cpu")).cos
    tensor([[1., 1.]])
    """
    if layout not in {"half", "interleaved"}:
        raise ValueError(f"rope_rotation: layout must be 'half' or 'interleaved', got {layout!r}")
    cos, sin = angle.cos(), angle.sin()
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    if layout == "half":
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    else:
        cos, sin = torch.stack((cos, cos), dim=-1).flatten(-2), torch.stack((-sin, sin), dim=-1).flatten(-2)
    if angle.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (b, 1, n, r)
    return Rotation(cos.to(device, dtype), sin.to(device, dtype), layout)


def _check(q: Tensor, k: Tensor, positions: Tensor, dim: int | None) -> None:
    for name, x in (("q", q), ("k", k)):
        shape = tuple(x.shape)
        if x.dim() != 4:
            raise ValueError(f"apply_rope: {name} must have shape (b, h, n, d), got {name} of shape {shape}")
        if dim is None and shape[-1] % 2:
            raise ValueError(f"apply_rope: last dimension must be even, got {name} of shape {shape}")
        if dim is not None and not 0 < dim <= shape[-1]:
            raise ValueError(f"apply_rope: dim must be between 2 and the head width, got dim {dim}, {name} {shape}")
        if positions.shape[-1:] != x.shape[2:3] or (positions.dim() == 2 and positions.shape[0] not in {1, shape[0]}):
            raise ValueError(
                f"apply_rope: positions must be (n,) or (b, n), got positions of shape {tuple(positions.shape)} "
                f"for {name} of shape {shape}"
            )


@export("functional.apply_rope", stable=True)
def apply_rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    layout: Layout = "half",
    base: float = 10000.0,
    dim: int | None = None,
    scaling: Scaling | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by their positions: x'_i = R(m θ_i) x_i for each pair i of features.

    q is (b, h, n, d) and k (b, h_kv, n, d), floating point; positions are integers (n,) or (b, n). The first `dim`
    features turn (all by default) and the rest pass. Returns both in their own dtype.
    Raises ValueError on an odd width or on positions that do not fit. Su et al. 2021, section 3.2.2, equation 34.

    >>> q = k = torch.ones(1, 1, 2, 2)
    >>> apply_rope(q, k, torch.arange(2))[0]
    tensor([[[[ 1.0000,  1.0000],
              [-0.3012,  1.3818]]]])
    """
    _check(q, k, positions, dim)
    length = positions.max() + 1 if scaling is not None and scaling.needs_length else None
    frequencies = rope_frequencies(q.shape[-1] if dim is None else dim, base=base, scaling=scaling, length=length)
    factor = 1.0 if scaling is None else scaling.attention_factor
    return rope_rotation(positions, frequencies, q.dtype, layout=layout, factor=factor)(q, k)


@export("functional.convert_rope_layout", stable=True)
def convert_rope_layout(weight: Tensor, heads: int, *, to: Layout, dim: int | None = None) -> Tensor:
    """Permute the rows of a q or k projection so that a model trained in the other layout runs in layout `to`.

    weight is (heads * d, ...): the projection's weight or its bias, of q or of k (then `heads` counts the k heads).
    The permutation is exact, and converting back restores every bit. `dim` as in `apply_rope`.
    Raises ValueError when the rows do not divide into heads of even width.

    >>> convert_rope_layout(torch.arange(8), 2, to="half")
    tensor([0, 2, 1, 3, 4, 6, 5, 7])
    """
    rows = weight.shape[0]
    if heads <= 0 or rows % heads:
        raise ValueError(f"convert_rope_layout: {rows} rows do not divide into {heads} heads")
    d = rows // heads
    r = d if dim is None else dim
    if r % 2 or not 0 < r <= d:
        raise ValueError(f"convert_rope_layout: rotated width must be even and at most {d}, got {r}")
    if to not in {"half", "interleaved"}:
        raise ValueError(f"convert_rope_layout: to must be 'half' or 'interleaved', got {to!r}")
    order = torch.arange(d, device=weight.device)
    grid = (r // 2, 2) if to == "half" else (2, r // 2)
    order = torch.cat((order[:r].view(grid).t().reshape(r), order[r:]))
    return weight.unflatten(0, (heads, d))[:, order].flatten(0, 1)


@export("nn.RotaryEmbedding", twin=apply_rope, stable=True)
class RotaryEmbedding(PositionEncoding):
    """RoPE with its options held: `module(q, k, positions)` is `apply_rope`; `rotation` prepares a step.

    It has no parameters, no buffers and an empty state dict; the frequencies stay fp64 whatever the model is cast to.

    >>> rope = RotaryEmbedding(64).to(torch.bfloat16)
    >>> rope.frequencies.dtype, len(rope.state_dict())
    (torch.float64, 0)
    >>> rotation = rope.rotation(torch.arange(5), torch.float32)  # once a step
    >>> q, k = rotation(torch.randn(1, 9, 5, 64), torch.randn(1, 3, 5, 64))  # in every layer
    """

    frequencies: Tensor
    layout: Layout

    def __init__(
        self, dim: int, *, base: float = 10000.0, layout: Layout = "half", scaling: Scaling | None = None
    ) -> None:
        super().__init__()
        self.dim, self.base, self.layout, self.scaling = dim, base, layout, scaling
        self.factor = 1.0 if scaling is None else scaling.attention_factor
        self.frequencies = rope_frequencies(dim, base=base, scaling=scaling)

    def _apply(self, fn, recurse: bool = True):
        module = super()._apply(fn, recurse)
        self.frequencies = moved(self.frequencies, fn)
        return module

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Prepare cos and sin for these positions, (n,) or (b, n), in `dtype`."""
        frequencies = self.frequencies
        if self.scaling is not None and self.scaling.needs_length:
            frequencies = self.scaling.frequencies(self.dim, self.base, positions.max() + 1)
        return rope_rotation(positions, frequencies, dtype, layout=self.layout, factor=self.factor)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return `apply_rope(q, k, positions)` with the options of this module."""
        _check(q, k, positions, self.dim)
        return self.rotation(positions, q.dtype)(q, k)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, base={self.base:g}, layout={self.layout!r}, scaling={self.scaling}"
