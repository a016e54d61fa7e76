"""M-RoPE (Wang et al. 2024, "Qwen2-VL", section 2.1): one rotary embedding over time, height and width.

The d/2 pairs of plain RoPE, each with its usual θ_i, are dealt out to three coordinates; a text token has all three
equal, and then M-RoPE is plain RoPE:
    angle of pair i = m_axis(i) θ_i
"sections" (Qwen2-VL): the first s_0 pairs follow time, the next s_1 height, the last s_2 width, so height and width
never meet the fast pairs. `interleaved` (Qwen3-VL): the axes take turns, t h w t h w .., as long as their share lasts;
the rest follows time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from volvelle.export import export
from volvelle.parts.position.encoding import PositionEncoding, moved
from volvelle.parts.position.rope import Layout, Rotation, rope_frequencies, rope_rotation_of_angles


def _axes(sections: Sequence[int], interleaved: bool) -> list[int]:
    """Return which coordinate each pair follows."""
    if not interleaved:
        return [axis for axis, size in enumerate(sections) for _ in range(size)]
    axes = [0] * sum(sections)
    for axis, size in enumerate(sections[1:], start=1):
        for turn in range(size):
            if axis + turn * len(sections) >= len(axes):
                raise ValueError(f"apply_mrope: sections {tuple(sections)} do not fit when interleaved")
            axes[axis + turn * len(sections)] = axis
    return axes


def _rotation(
    positions: Tensor, frequencies: Tensor, dtype: torch.dtype, axes: Sequence[int], layout: Layout
) -> Rotation:
    if positions.dim() not in {2, 3} or positions.is_floating_point() or max(axes) >= positions.shape[-1]:
        raise ValueError(
            f"apply_mrope: positions must be integers of shape (n, {max(axes) + 1}) or (b, n, {max(axes) + 1}), "
            f"got {positions.dtype} of shape {tuple(positions.shape)}"
        )
    where = torch.device("cpu") if positions.device.type == "mps" else positions.device  # mps has no fp64
    coordinates = positions.to(where)[..., torch.tensor(axes, device=where)]  # (..., n, d/2)
    return rope_rotation_of_angles(coordinates * frequencies.to(where), dtype, positions.device, layout=layout)


@export("functional.apply_mrope")
def apply_mrope(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    sections: Sequence[int],
    interleaved: bool = False,
    layout: Layout = "half",
    base: float = 10000.0,
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by coordinates (time, height, width): pair i by m_axis(i) θ_i.

    q is (b, h, n, d) and k (b, h_kv, n, d), positions are integers (n, 3) or (b, n, 3) (transformers: (3, b, n)),
    sections the number of pairs that follow each coordinate, d/2 in all. Returns both in their own dtype.
    Raises ValueError on sections or positions that do not fit. Wang et al. 2024, section 2.1.

    >>> from volvelle.parts.position.rope import apply_rope
    >>> q, text = torch.randn(1, 2, 5, 8), torch.arange(5)
    >>> torch.equal(apply_mrope(q, q, text[:, None].expand(5, 3), sections=(2, 1, 1))[0], apply_rope(q, q, text)[0])
    True
    """
    if 2 * sum(sections) != q.shape[-1]:
        raise ValueError(f"apply_mrope: sections must add up to d/2, got {tuple(sections)} for q {tuple(q.shape)}")
    axes = _axes(sections, interleaved)
    return _rotation(positions, rope_frequencies(q.shape[-1], base=base), q.dtype, axes, layout)(q, k)


@export("nn.MultimodalRotaryEmbedding", twin=apply_mrope)
class MultimodalRotaryEmbedding(PositionEncoding):
    """`apply_mrope` with its options held; no parameters, and the frequencies stay fp64.

    >>> rope = MultimodalRotaryEmbedding((2, 3, 3))
    >>> rotation = rope.rotation(torch.zeros(1, 5, 3, dtype=torch.int64), torch.float32)  # once a step
    >>> q, k = rotation(torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16))  # in every layer
    """

    frequencies: Tensor

    def __init__(
        self,
        sections: Sequence[int],
        *,
        interleaved: bool = False,
        base: float = 10000.0,
        layout: Layout = "half",
    ) -> None:
        super().__init__()
        self.sections, self.interleaved, self.base = tuple(sections), interleaved, base
        self.layout: Layout = layout
        self.axes = _axes(sections, interleaved)
        self.frequencies = rope_frequencies(2 * sum(sections), base=base)

    def _apply(self, fn, recurse: bool = True):
        module = super()._apply(fn, recurse)
        self.frequencies = moved(self.frequencies, fn)
        return module

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Prepare cos and sin at these coordinates, (n, 3) or (b, n, 3), in `dtype`."""
        return _rotation(positions, self.frequencies, dtype, self.axes, self.layout)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return `apply_mrope(q, k, positions)` with the options of this module."""
        return self.rotation(positions, q.dtype)(q, k)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"sections={self.sections}, interleaved={self.interleaved}, base={self.base:g}"
