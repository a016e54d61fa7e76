"""Positions on a grid: RoPE and learned vectors, each axis for itself.

RoPE on several axes (as in the vision tower of Qwen2-VL; for images: Heo et al. 2024, "Rotary position embedding for
vision transformer", section 3, "axial"): the d/2 pairs of features are divided among the axes, a pair turns by the
coordinate of its axis:
    angle of pair i of axis a = m_a θ_i,   θ_i = base^(-2i / (d / axes))
so that q · k depends on the differences of the coordinates only. Learned: one trained vector a row and a column,
    p(y, x) = W_0[y] + W_1[x]     or joined, [W_0[y], W_1[x]] (the code of Reformer, Kitaev et al. 2020)
which needs height + width vectors in place of height * width.

Coordinates are integers (n, axes) or (b, n, axes); `grid_positions` gives those of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.position.encoding import PositionEncoding, moved
from volvelle.parts.position.learned import learned_positions
from volvelle.parts.position.rope import Layout, Rotation, rope_frequencies, rope_rotation_of_angles

Join = Literal["sum", "concat"]


@export("functional.grid_positions")
def grid_positions(*sizes: int, device: torch.device | str | None = None) -> Tensor:
    """Return the coordinates of a grid in row-major order, (product of sizes, axes), int64.

    >>> grid_positions(2, 2).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes)).reshape(-1, len(sizes))


def _check(name: str, positions: Tensor, axes: int) -> None:
    if positions.dim() not in {2, 3} or positions.shape[-1] != axes or positions.is_floating_point():
        raise ValueError(
            f"{name}: positions must be integers of shape (n, {axes}) or (b, n, {axes}), "
            f"got {positions.dtype} of shape {tuple(positions.shape)}"
        )


def axial_rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype, *, layout: Layout = "half") -> Rotation:
    """Prepare the turning at coordinates (n, axes) or (b, n, axes) with fp64 frequencies θ, those of one axis."""
    where = torch.device("cpu") if positions.device.type == "mps" else positions.device  # mps has no fp64
    angle = positions.to(where).unsqueeze(-1) * frequencies.to(where)  # (..., n, axes, d / (2 axes))
    return rope_rotation_of_angles(angle.flatten(-2), dtype, positions.device, layout=layout)


@export("functional.apply_axial_rope")
def apply_axial_rope(
    q: Tensor, k: Tensor, positions: Tensor, *, layout: Layout = "half", base: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by their coordinates on a grid: the pairs of axis a by m_a θ_i.

    q is (b, h, n, d) and k (b, h_kv, n, d), positions are integers (n, axes) or (b, n, axes); d must be a multiple of
    2 * axes. The first d / (2 axes) pairs belong to the first axis, and so on; `layout` as in `apply_rope`. Returns
    both in their own dtype. Raises ValueError on widths or positions that do not fit. Heo et al. 2024, section 3.

    >>> q = torch.ones(1, 1, 4, 4)
    >>> turned, _ = apply_axial_rope(q, q, grid_positions(2, 2))
    >>> turned[0, 0, 1]  # row 0, column 1: only the pair of the columns turns
    tensor([ 1.0000, -0.3012,  1.0000,  1.3818])
    """
    axes, d = positions.shape[-1], q.shape[-1]
    _check("apply_axial_rope", positions, axes)
    if d % (2 * axes) or k.shape[-1] != d:
        raise ValueError(
            f"apply_axial_rope: the head width must be a multiple of {2 * axes} for {axes} axes, "
            f"got q of shape {tuple(q.shape)} and k of shape {tuple(k.shape)}"
        )
    return axial_rotation(positions, rope_frequencies(d // axes, base=base), q.dtype, layout=layout)(q, k)


@export("nn.AxialRotaryEmbedding", twin=apply_axial_rope)
class AxialRotaryEmbedding(PositionEncoding):
    """`apply_axial_rope` with its options held; no parameters, and the frequencies stay fp64.

    >>> rope = AxialRotaryEmbedding(16)
    >>> rotation = rope.rotation(grid_positions(3, 5), torch.float32)  # once a step
    >>> q, k = rotation(torch.randn(1, 4, 15, 16), torch.randn(1, 2, 15, 16))  # in every layer
    """

    frequencies: Tensor

    def __init__(self, dim: int, *, axes: int = 2, base: float = 10000.0, layout: Layout = "half") -> None:
        super().__init__()
        if dim <= 0 or axes < 1 or dim % (2 * axes):
            raise ValueError(f"AxialRotaryEmbedding: dim must be a multiple of {2 * axes} for {axes} axes, got {dim}")
        self.dim, self.axes, self.base = dim, axes, base
        self.layout: Layout = layout
        self.frequencies = rope_frequencies(dim // axes, base=base)

    def _apply(self, fn, recurse: bool = True):
        module = super()._apply(fn, recurse)
        self.frequencies = moved(self.frequencies, fn)
        return module

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Prepare cos and sin at these coordinates, (n, axes) or (b, n, axes), in `dtype`."""
        _check("AxialRotaryEmbedding", positions, self.axes)
        return axial_rotation(positions, self.frequencies, dtype, layout=self.layout)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return `apply_axial_rope(q, k, positions)` with the options of this module."""
        return self.rotation(positions, q.dtype)(q, k)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, axes={self.axes}, base={self.base:g}, layout={self.layout!r}"


@export("functional.axial_positions")
def axial_positions(positions: Tensor, weights: Sequence[Tensor], *, join: Join = "sum") -> Tensor:
    """Return W_0[y] + W_1[x] + .., or the rows joined, for each coordinate (y, x, ..).

    positions are integers (n, axes) or (b, n, axes), weights one (size, dim) for each axis; the result is (n, dim) or
    (b, n, dim), with join "concat" the widths added up. Raises ValueError on coordinates outside a table, or axes that
    do not match. Joined: the published code of Reformer (Kitaev et al. 2020).

    >>> rows, columns = torch.tensor([[0.0], [10.0]]), torch.tensor([[0.0], [1.0], [2.0]])
    >>> axial_positions(torch.tensor([[1, 2], [0, 1]]), (rows, columns)).flatten()
    tensor([12.,  1.])
    """
    _check("axial_positions", positions, len(weights))
    if join not in {"sum", "concat"}:
        raise ValueError(f"axial_positions: join must be 'sum' or 'concat', got {join!r}")
    parts = [learned_positions(positions[..., axis], weight) for axis, weight in enumerate(weights)]
    return torch.cat(parts, dim=-1) if join == "concat" else sum(parts[1:], start=parts[0])


@export("nn.AxialPositions", twin=axial_positions)
class AxialPositions(PositionEncoding):
    """`axial_positions` with one weight for each axis; `embed` adds the vectors to the embeddings.

    With join "concat" the width is divided evenly among the axes, the remainder to the first.

    >>> AxialPositions((3, 5), 8).embed(torch.zeros(1, 15, 8), grid_positions(3, 5)).shape
    torch.Size([1, 15, 8])
    """

    def __init__(self, sizes: Sequence[int], dim: int, *, join: Join = "sum") -> None:
        super().__init__()
        self.join: Join = join
        share, rest = divmod(dim, len(sizes))
        widths = [dim if join == "sum" else share + rest * (axis == 0) for axis in range(len(sizes))]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(size, width)) for size, width in zip(sizes, widths, strict=True)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from N(0, 0.02)."""
        for weight in self.weights:
            nn.init.normal_(weight, std=0.02)

    def forward(self, positions: Tensor) -> Tensor:
        """Return the vectors at these coordinates, (n, dim) or (b, n, dim)."""
        return axial_positions(positions, list(self.weights), join=self.join)

    def embed(self, x: Tensor, positions: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return x (b, n, dim) plus the vectors of its coordinates."""
        return x + self(positions)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"sizes={[weight.shape[0] for weight in self.weights]}, join={self.join!r}"
