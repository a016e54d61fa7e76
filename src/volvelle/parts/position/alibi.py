"""ALiBi (Press et al. 2022, "Train short, test long: attention with linear biases", section 3): far keys cost more.

    softmax_j(q_i · k_j / sqrt(d) - m_h (i - j)),  j <= i
with one fixed slope m_h a head, a geometric sequence: 2^(-8 h / n) for n heads, a power of two. Nothing is trained, and
nothing is added to the embeddings. In both directions the distance is |i - j|, or each side has slopes of its own.

Published implementations add m_h j instead of -m_h (i - j): the same after a softmax over j <= i, and only there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.position.encoding import DistanceBias, PositionEncoding, distances, moved


@export("functional.alibi_slopes", stable=True)
def alibi_slopes(heads: int, *, bias_max: float = 8.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the slope m_h of each head, (heads,).

    For n = 2^k heads they are 2^(-bias_max h / n), h = 1 .. n. For other numbers: those of the closest power of two
    below, then every other one of twice as many heads, as the authors' code does. Raises ValueError when heads < 1.
    Press et al. 2022, section 3.

    >>> alibi_slopes(4)
    tensor([0.2500, 0.0625, 0.0156, 0.0039])
    >>> alibi_slopes(3)
    tensor([0.0625, 0.0039, 0.2500])
    """
    if heads < 1:
        raise ValueError(f"alibi_slopes: heads must be at least 1, got {heads}")
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-bias_max * h / power) for h in range(1, power + 1)]
    slopes += [2.0 ** (-bias_max * h / (2 * power)) for h in range(1, 2 * (heads - power) + 1, 2)]
    return torch.tensor(slopes, dtype=dtype)


def _linear(distance: Tensor, slopes: Tensor, right: Tensor | None) -> Tensor:
    """Return -m |i - j| at distances (...), (h, ...); `right` has the slopes of keys after the query."""
    shape = (-1,) + (1,) * distance.dim()
    size = distance.abs()
    if right is None:
        return -slopes.view(shape) * size
    return -torch.where(distance >= 0, slopes.view(shape), right.view(shape)) * size


@export("functional.alibi_bias")
def alibi_bias(
    q_positions: Tensor, k_positions: Tensor, slopes: Tensor, *, right_slopes: Tensor | None = None
) -> Tensor:
    """Return -m_h |i - j|, the score bias of queries at i and keys at j.

    Positions are integers (n_q,) or (b, n_q), and (n_k,) or (b, n_k); slopes are (h,); the result is (b or 1, h, n_q,
    n_k) in their dtype. Where j > i the slope is `right_slopes` when given. Press et al. 2022, section 3.

    >>> alibi_bias(torch.tensor([2]), torch.arange(4), torch.tensor([0.5]))
    tensor([[[[-1.0000, -0.5000, -0.0000, -0.5000]]]])
    """
    return _linear(distances(q_positions, k_positions)[:, 0], slopes, right_slopes).transpose(0, 1)


class _LinearBias(DistanceBias):
    def __init__(self, slopes: Tensor, right_slopes: Tensor | None) -> None:
        self.slopes, self.right_slopes = slopes, right_slopes
        self.learnable = slopes.requires_grad

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.slopes,) if self.right_slopes is None else (self.slopes, self.right_slopes)

    def at(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        right = None if self.right_slopes is None else self.right_slopes.to(distance.device, dtype)
        return _linear(distance, self.slopes.to(distance.device, dtype), right)


@export("nn.ALiBi", twin=alibi_bias)
class ALiBi(PositionEncoding):
    """`alibi_bias` with its slopes held: fixed (fp64, not in the state dict) or, with `learnable`, trained.

    `right_slopes` are those of keys after the query, for attention in both directions; None takes the same.

    >>> module, q = ALiBi(8), torch.randn(2, 8, 5, 16)
    >>> module.bias().tile(q, q, torch.arange(5), torch.arange(5)).shape
    torch.Size([1, 8, 5, 5])
    """

    slopes: Tensor
    right_slopes: Tensor | None

    def __init__(
        self,
        heads: int,
        *,
        bias_max: float = 8.0,
        right_slopes: Sequence[float] | None = None,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        if right_slopes is not None and len(right_slopes) != heads:
            raise ValueError(f"ALiBi: right_slopes must hold {heads} slopes, got {len(right_slopes)}")
        with torch.device("cpu"):  # values are needed also where a model is built on the meta device
            slopes = alibi_slopes(heads, bias_max=bias_max, dtype=torch.float64)
        right = None if right_slopes is None else torch.tensor(right_slopes, dtype=torch.float64, device="cpu")
        self.learnable = learnable
        if learnable:
            dtype = torch.get_default_dtype()
            self.slopes = nn.Parameter(slopes.to(dtype))
            self.right_slopes = None if right is None else nn.Parameter(right.to(dtype))
        else:
            self.slopes, self.right_slopes = slopes, right

    def _apply(self, fn, recurse: bool = True):
        module = super()._apply(fn, recurse)
        if not self.learnable:
            self.slopes = moved(self.slopes, fn)
            self.right_slopes = None if self.right_slopes is None else moved(self.right_slopes, fn)
        return module

    def forward(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Return the bias (b or 1, h, n_q, n_k)."""
        return alibi_bias(q_positions, k_positions, self.slopes, right_slopes=self.right_slopes)

    def bias(self) -> DistanceBias:
        """Return the score bias."""
        return _LinearBias(self.slopes, self.right_slopes)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"heads={self.slopes.shape[0]}, learnable={self.learnable}"
