"""Relative positions of Transformer-XL (Dai et al. 2019, section 3.3) and XLNet (Yang et al. 2019, section 2.4).

    A_ij = q_i · k_j + q_i · W_R R_{i-j} + u · k_j + v · W_R R_{i-j},   all times 1 / sqrt(d)
           (a) content (b) position      (c) content bias (d) position bias
R_{i-j} is the sinusoidal vector of the distance (all sines, then all cosines), W_R a trained map to the head's width, u
and v one trained vector a head each: r_w_bias and r_r_bias in the published code. XLNet uses both signs of i - j.

The published code computes one row of (b) + (d) for each distance and shifts rows against each other; that needs
positions that follow each other. Here sin((i-j)θ) and cos((i-j)θ) are expanded by the addition theorems, so that (b) +
(d) is a product A_i · B_j of a vector of the query and one of the key: the same numbers for any positions, caches,
packed rows and trees, without an (n, n, width) tensor. `relative_shift` is the published way.

Shapes: b batch, h heads, d features a head, D features of R.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.position.encoding import Bias, PositionEncoding, exact, widened
from volvelle.parts.position.sinusoidal import sinusoidal_positions


def _sines(positions: Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return sin(mθ) and cos(mθ), each (n, D/2) or (b, 1, n, D/2)."""
    table = sinusoidal_positions(positions, width, base=base, layout="half", dtype=dtype)
    table = table.unsqueeze(1) if positions.dim() == 2 else table
    sin, cos = table.chunk(2, dim=-1)
    return sin, cos


@export("functional.transformer_xl_bias")
def transformer_xl_bias(
    q: Tensor,
    k: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    *,
    u: Tensor,
    v: Tensor,
    weight: Tensor,
    scale: float | None = None,
    base: float = 10000.0,
) -> Tensor:
    """Return scale * ((q_i + v) · W_R R_{i-j} + u · k_j), the score bias of queries at i and keys at j.

    q is (b, h, n_q, d) and k (b, h_kv, n_k, d), positions are integers (n_q,) or (b, n_q), and (n_k,) or (b, n_k); u
    and v are (h, d), weight W_R is (h, d, D); scale defaults to 1 / sqrt(d). The result is (b, h, n_q, n_k), in fp32
    for 16-bit q. Raises ValueError on shapes that do not fit. Dai et al. 2019, section 3.3.

    >>> q = k = torch.zeros(1, 1, 2, 2)
    >>> u, v, w = torch.zeros(1, 2), torch.ones(1, 2), torch.eye(2)[None]  # sin(i - j) + cos(i - j), over sqrt(2)
    >>> transformer_xl_bias(q, k, torch.arange(2), torch.arange(2), u=u, v=v, weight=w)
    tensor([[[[ 0.7071, -0.2130],
              [ 0.9771,  0.7071]]]])
    """
    h, d = q.shape[1], q.shape[-1]
    if u.shape != (h, d) or v.shape != (h, d) or weight.shape[:2] != (h, d):
        raise ValueError(
            f"transformer_xl_bias: u and v must be (h, d) = {(h, d)} and weight (h, d, D), "
            f"got {tuple(u.shape)}, {tuple(v.shape)} and {tuple(weight.shape)}"
        )
    factor = float(d**-0.5) if scale is None else scale
    q, k = widened(q), widened(k)
    u, v, weight = u.to(q.dtype), v.to(q.dtype), weight.to(q.dtype)
    sin_i, cos_i = _sines(q_positions, weight.shape[-1], base, q.dtype)
    sin_j, cos_j = _sines(k_positions, weight.shape[-1], base, q.dtype)
    with exact(q):
        y_sin, y_cos = ((q + v[:, None]) @ weight * factor).chunk(2, dim=-1)  # (b, h, n_q, D/2)
        # sin((i-j)θ) = sin iθ cos jθ - cos iθ sin jθ and cos((i-j)θ) = cos iθ cos jθ + sin iθ sin jθ
        of_query = torch.cat((y_sin * sin_i + y_cos * cos_i, y_cos * sin_i - y_sin * cos_i), dim=-1)
        of_key = torch.cat((cos_j, sin_j), dim=-1)
        k = k.repeat_interleave(h // k.shape[1], 1)
        content_bias = (k @ (u * factor).unsqueeze(-1)).transpose(-2, -1)  # (b, h, 1, n_k)
        return of_query @ of_key.transpose(-2, -1) + content_bias


def relative_shift(x: Tensor) -> Tensor:
    """Line up rows of distances: each row of x moves left until its column j belongs to key j.

    x is (..., n_q, n_q + n_k - 1), its columns the distances n_k - 1 down to 1 - n_q, for queries that are the last n_q
    of the n_k keys; the result is (..., n_q, n_k). One pad and two reshapes (Dai et al. 2019, appendix B).

    >>> relative_shift(torch.tensor([[1, 0, -1], [1, 0, -1]]))  # distances of two tokens
    tensor([[ 0, -1],
            [ 1,  0]])
    """
    n_q, columns = x.shape[-2:]
    padded = torch.nn.functional.pad(x, (1, 0))
    shifted = padded.reshape(*x.shape[:-2], columns + 1, n_q)[..., 1:, :].reshape(x.shape)
    return shifted[..., : columns + 1 - n_q]


class _TransformerXLBias(Bias):
    def __init__(self, u: Tensor, v: Tensor, weight: Tensor, scale: float | None, base: float) -> None:
        self.u, self.v, self.weight, self.given_scale, self.base = u, v, weight, scale, base

    def tensors(self) -> tuple[Tensor, ...]:
        return self.u, self.v, self.weight

    def tile(self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        return transformer_xl_bias(
            q,
            k,
            q_positions,
            k_positions,
            u=self.u,
            v=self.v,
            weight=self.weight,
            scale=self.given_scale,
            base=self.base,
        )


@export("nn.TransformerXLBias", twin=transformer_xl_bias)
class TransformerXLBias(PositionEncoding):
    """`transformer_xl_bias` with its weights: u, v (heads, d) and W_R (heads, d, width). A model has one a layer.

    >>> module, q = TransformerXLBias(8, 16, width=32), torch.randn(2, 8, 5, 16)
    >>> module.bias().tile(q, q, torch.arange(5), torch.arange(5)).shape
    torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self, heads: int, head_width: int, *, width: int, scale: float | None = None, base: float = 10000.0
    ) -> None:
        super().__init__()
        self.scale, self.base = scale, base
        self.u = nn.Parameter(torch.empty(heads, head_width))
        self.v = nn.Parameter(torch.empty(heads, head_width))
        self.weight = nn.Parameter(torch.empty(heads, head_width, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights from N(0, 0.02), as the published code does."""
        for parameter in (self.u, self.v, self.weight):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Return the bias (b, h, n_q, n_k)."""
        return self.bias().tile(q, k, q_positions, k_positions)

    def bias(self) -> Bias:
        """Return the score bias."""
        return _TransformerXLBias(self.u, self.v, self.weight, self.scale, self.base)

    def extra_repr(self) -> str:
        """Show the options."""
        heads, head_width, width = self.weight.shape
        return f"{heads}, {head_width}, width={width}, base={self.base:g}"
