"""Relative positions on a grid, row and column each for itself: Li et al. 2022, "MViTv2: Improved Multiscale Vision
Transformers for Classification and Detection", section 4.1, as Segment Anything's image encoder uses them.

    bias_ij = Q_i · R^h[y_i - y_j]  +  Q_i · R^w[x_i - x_j]

for queries that are not scaled. The block is a product of two thin matrices, because each term depends on the key only
through its row, or its column:

    bias = [Q R^h, Q R^w] [onehot(y), onehot(x)]^T        (n, H + W) times (H + W, n)

so that H + W further features of q and k carry it through any attention kernel, and no n x n tensor exists.

Positions are numbers of places in row-major order, p = y W + x.
Shapes: b batch, h heads, d features a head, a grid of H x W places, n = H W.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from volvelle.export import export
from volvelle.parts.position.encoding import Bias, exact, widened


def _check(q: Tensor, rel_h: Tensor, rel_w: Tensor) -> None:
    if any(r.dim() != 2 or r.shape[0] % 2 == 0 or r.shape[1] != q.shape[-1] for r in (rel_h, rel_w)):
        raise ValueError(
            "decomposed_bias: rel_h and rel_w must be (2 H - 1, d) and (2 W - 1, d), "
            f"got {tuple(rel_h.shape)} and {tuple(rel_w.shape)} for q of shape {tuple(q.shape)}"
        )


@export("functional.decomposed_bias")
def decomposed_bias(q: Tensor, q_positions: Tensor, k_positions: Tensor, *, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """Return Q_i · R^h[y_i - y_j] + Q_i · R^w[x_i - x_j], the score bias of queries at i and keys at j.

    q is (b, h, n_q, d), not scaled; rel_h (2 H - 1, d) and rel_w (2 W - 1, d) begin with the distances 1 - H and 1 - W;
    positions are integers (n_q,) or (b, n_q), and (n_k,) or (b, n_k), below H W. The result is (b, h, n_q, n_k), in
    fp32 for 16-bit q. Raises ValueError on tables that do not fit. Li et al. 2022, section 4.1.

    >>> q, rows = torch.ones(1, 1, 2, 1), torch.tensor([[10.0], [20.0], [30.0]])
    >>> decomposed_bias(q, torch.tensor([0, 3]), torch.arange(4), rel_h=rows, rel_w=rows / 10)
    tensor([[[[22., 21., 12., 11.],
              [33., 32., 23., 22.]]]])
    """
    _check(q, rel_h, rel_w)
    width = (rel_w.shape[0] + 1) // 2
    q, found = widened(q), []
    for table, q_at, k_at in (
        (rel_h, q_positions // width, k_positions // width),
        (rel_w, q_positions % width, k_positions % width),
    ):
        with exact(q):
            products = q @ table.to(q.dtype).T  # (b, h, n_q, 2 H - 1): each product once
        index = q_at[..., :, None] - k_at[..., None, :] + table.shape[0] // 2  # (n_q, n_k) or (b, n_q, n_k)
        index = index.unsqueeze(-3)
        found.append(products.gather(-1, index.expand(*products.shape[:-1], -1)))
    return found[0] + found[1]


class DecomposedBias(Bias):
    """`decomposed_bias` with its tables held, as a term of `attention`; it factors when a call covers the whole grid.

    >>> from volvelle.functional import attention
    >>> q, k, v = torch.randn(3, 1, 2, 12, 8)  # a grid of 3 x 4
    >>> bias = DecomposedBias(torch.randn(5, 8), torch.randn(7, 8))
    >>> whole = bias.tile(q, k, torch.arange(12), torch.arange(12))
    >>> torch.allclose(attention(q, k, v, bias=bias), attention(q, k, v, bias=whole), atol=1e-5)
    True
    """

    def __init__(self, rel_h: Tensor, rel_w: Tensor):
        self.rel_h, self.rel_w = rel_h, rel_w

    def tensors(self) -> tuple[Tensor, ...]:
        """The two tables."""
        return self.rel_h, self.rel_w

    def tile(self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Return the block (b, h, n_q, n_k)."""
        return decomposed_bias(q, q_positions, k_positions, rel_h=self.rel_h, rel_w=self.rel_w)

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the tables."""
        return (self.rel_h.shape[0] + 1) // 2, (self.rel_w.shape[0] + 1) // 2

    def rank(self, n_q: int, n_k: int) -> int | None:
        """H + W for a whole grid against itself, else None."""
        height, width = self.grid
        return height + width if n_q == n_k == height * width else None

    def factors(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return [Q R^h, Q R^w] (b, h, n, H + W) and the keys' rows and columns, one-hot, (1, 1, n, H + W)."""
        _check(q, self.rel_h, self.rel_w)
        b, h, n, d = q.shape
        height, width = self.grid
        grid = q.reshape(b * h, height, width, d)
        rows = _table(self.rel_h, height).to(q.dtype)  # (H, H, d): from query's row to key's row
        columns = _table(self.rel_w, width).to(q.dtype)
        of_rows = torch.einsum("byxd,yjd->byxj", grid, rows)
        of_columns = torch.einsum("byxd,xjd->byxj", grid, columns)
        of_query = torch.cat((of_rows, of_columns), dim=-1).view(b, h, n, height + width)
        places = torch.arange(n, device=q.device)
        of_key = torch.cat((F.one_hot(places // width, height), F.one_hot(places % width, width)), dim=-1)
        return of_query, of_key.to(q.dtype)[None, None]


def _table(rel: Tensor, size: int) -> Tensor:
    """The rows R[i - j] of all pairs, (size, size, d)."""
    places = torch.arange(size, device=rel.device)
    return rel[places[:, None] - places + size - 1]
