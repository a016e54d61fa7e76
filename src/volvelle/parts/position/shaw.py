"""Relative position representations (Shaw et al. 2018, "Self-attention with relative position representations", section
3.2): a trained vector for each clipped distance, added to the keys and to the values.

    e_ij = q_i · (k_j + a^K_ij) / sqrt(d),   z_i = Σ_j α_ij (v_j + a^V_ij),   α_i = softmax(e_i)
    a^K_ij = w^K_clip(j - i, -k, k),   a^V_ij = w^V_clip(j - i, -k, k)
Distances beyond k share a vector, so text may be longer than the trained one. The tables are shared by all heads.

No (n, n, d) tensor: q_i · w^K_c is computed once for each of the 2k + 1 vectors and looked up (section 3.3); the
weights of one distance are summed before they meet w^V.

Shapes: b batch, h heads, d features a head, r = 2k + 1 (or left + right + 1) vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.position.encoding import Bias, PositionEncoding, distances, exact, widened


def _index(q_positions: Tensor, k_positions: Tensor, rows: int, left: int | None) -> Tensor:
    """Return the row of a table for each pair, (b or 1, 1, n_q, n_k): clip(j - i, -left, rows - 1 - left) + left."""
    left = (rows - 1) // 2 if left is None else left
    if not 0 <= left < rows:
        raise ValueError(f"shaw: left must be from 0 to {rows - 1} for a table of {rows} rows, got {left}")
    return (left - distances(q_positions, k_positions)).clamp(0, rows - 1)


@export("functional.shaw_key_bias")
def shaw_key_bias(
    q: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    weight: Tensor,
    *,
    left: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return scale * q_i · w^K_clip(j - i), the score bias of queries at i and keys at j.

    q is (b, h, n_q, d), positions are integers (n_q,) or (b, n_q), and (n_k,) or (b, n_k); weight is (r, d), row c + k
    for distance c, or row c + left where left and right reach differ; scale defaults to 1 / sqrt(d). The result is (b,
    h, n_q, n_k), in fp32 for 16-bit q. Raises ValueError on a left that is not in the table.
    Shaw et al. 2018, section 3.2, equation 4.

    >>> q, w = torch.ones(1, 1, 2, 1), torch.tensor([[-1.0], [0.0], [1.0]])
    >>> shaw_key_bias(q, torch.arange(2), torch.arange(3), w)
    tensor([[[[ 0.,  1.,  1.],
              [-1.,  0.,  1.]]]])
    """
    factor = float(q.shape[-1] ** -0.5) if scale is None else scale
    q = widened(q)
    index = _index(q_positions, k_positions, weight.shape[0], left)
    with exact(q):
        products = (q * factor) @ weight.to(q.dtype).t()  # (b, h, n_q, r)
    return products.gather(-1, index.expand(*products.shape[:-1], -1))


@export("functional.shaw_value_term")
def shaw_value_term(
    weights: Tensor, q_positions: Tensor, k_positions: Tensor, weight: Tensor, *, left: int | None = None
) -> Tensor:
    """Return Σ_j α_ij w^V_clip(j - i), what the relative vectors add to the output.

    weights α are (b, h, n_q, n_k), positions as in `shaw_key_bias`, weight is (r, d_v); the result is (b, h, n_q, d_v)
    in the dtype of the weights. Shaw et al. 2018, section 3.2, equation 3.

    >>> alpha, w = torch.tensor([[[[0.5, 0.25, 0.25]]]]), torch.tensor([[-1.0], [0.0], [1.0]])
    >>> shaw_value_term(alpha, torch.tensor([0]), torch.arange(3), w)
    tensor([[[[0.5000]]]])
    """
    rows = weight.shape[0]
    index = _index(q_positions, k_positions, rows, left)
    sums = weights.new_zeros(*weights.shape[:-1], rows).scatter_add(-1, index.expand_as(weights), weights)
    with exact(weights):
        return sums @ weight.to(weights.dtype)


class _ShawTerms(Bias):
    def __init__(self, key: Tensor, value: Tensor | None, left: int, scale: float | None) -> None:
        self.key, self.value, self.left, self.given_scale = key, value, left, scale
        self.has_value_term = value is not None

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.key,) if self.value is None else (self.key, self.value)

    def tile(self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        return shaw_key_bias(q, q_positions, k_positions, self.key, left=self.left, scale=self.given_scale)

    def value_term(self, weights: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        if self.value is None:
            return super().value_term(weights, q_positions, k_positions)
        return shaw_value_term(weights, q_positions, k_positions, self.value, left=self.left)


@export("nn.ShawBias", twin=shaw_key_bias)
class ShawBias(PositionEncoding):
    """`shaw_key_bias` and `shaw_value_term` with their tables, (k + right + 1, d) and (k + right + 1, d_v).

    `right` is the reach after the query (default: k); `value_width` None leaves the value term out. A model has one a
    layer. `scale` is that of the attention, None: 1 / sqrt(d).

    >>> module, q = ShawBias(16, k=4, value_width=16), torch.randn(2, 8, 5, 16)
    >>> bias = module.bias()
    >>> bias.tile(q, q, torch.arange(5), torch.arange(5)).shape, bias.has_value_term
    (torch.Size([2, 8, 5, 5]), True)
    """

    def __init__(
        self,
        head_width: int,
        *,
        k: int,
        right: int | None = None,
        value_width: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        right = k if right is None else right
        if k < 0 or right < 0:
            raise ValueError(f"ShawBias: the reach must not be negative, got k {k} and right {right}")
        rows = k + right + 1
        self.k, self.scale = k, scale
        self.key = nn.Parameter(torch.empty(rows, head_width))
        self.value = None if value_width is None else nn.Parameter(torch.empty(rows, value_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables as Glorot and Bengio do."""
        nn.init.xavier_uniform_(self.key)
        if self.value is not None:
            nn.init.xavier_uniform_(self.value)

    def forward(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Return the key term (b, h, n_q, n_k)."""
        return shaw_key_bias(q, q_positions, k_positions, self.key, left=self.k, scale=self.scale)

    def bias(self) -> Bias:
        """Return the score bias, with its value term."""
        return _ShawTerms(self.key, self.value, self.k, self.scale)

    def extra_repr(self) -> str:
        """Show the options."""
        rows, width = self.key.shape
        return f"{width}, k={self.k}, right={rows - 1 - self.k}, value_term={self.value is not None}"
