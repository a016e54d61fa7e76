"""Packed rows: a query attends to the keys of its own segment, said by two rows of numbers instead of a mask.

Shapes: b batch, n_q queries, n_k keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Segmentation = Tensor | tuple[Tensor, Tensor]
"""Integers (b or 1, n_k), the queries being the last of the keys, or a pair: of the queries and of the keys."""


class Segments(NamedTuple):
    """The segment of each query (b or 1, n_q) and of each key (b or 1, n_k); equal numbers may attend.

    >>> packed = Segments.of(torch.tensor([[0, 0, 1]]), (1, 3, 3))
    >>> packed.same().long()
    tensor([[[[1, 1, 0],
              [1, 1, 0],
              [0, 0, 1]]]])
    """

    queries: Tensor
    keys: Tensor

    @classmethod
    def of(cls, given: Segmentation, sizes: tuple[int, int, int]) -> Segments:
        """Check what a caller gave for `sizes` (b, n_q, n_k); raises ValueError or TypeError where it does not fit."""
        b, n_q, n_k = sizes
        queries, keys = given if isinstance(given, tuple) else (given[..., max(given.shape[-1] - n_q, 0) :], given)
        for name, x, n in (("queries", queries, n_q), ("keys", keys, n_k)):
            if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
                raise TypeError(f"attention: segments must be integers, got {x.dtype} for the {name}")
            if x.dim() != 2 or x.shape[0] not in {1, b} or x.shape[1] != n:
                raise ValueError(
                    f"attention: segments of the {name} must be (b or 1, n) = ({b} or 1, {n}), got {tuple(x.shape)}"
                )
        return cls(queries, keys)

    @property
    def rows(self) -> int:
        """How many rows of the batch have segments of their own; 1 where all share them."""
        return max(self.queries.shape[0], self.keys.shape[0])

    def row(self, i: int) -> Segments:
        """The segments of one row of the batch."""
        return Segments(*(x[i : i + 1] if x.shape[0] > 1 else x for x in self))

    def same(self, queries: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """Return (b or 1, 1, queries, keys) bool: whether both lie in one segment."""
        return self.queries[:, None, queries, None] == self.keys[:, None, None, keys]

    def share(self, of_queries: Tensor, of_keys: Tensor) -> bool:
        """Whether all queries (n_q,) and keys (n_k,) of a segment have the same number in these; for one row."""
        numbers = torch.cat((self.queries[0], self.keys[0]))
        if self.rows > 1 or type(numbers) is not Tensor:  # a tensor of another kind may have no values to ask for
            return False
        both = torch.stack((numbers, torch.cat((of_queries, of_keys))))
        return torch.unique(both, dim=1).shape[1] == torch.unique(numbers).shape[0]

    def meetings(self, side: int) -> tuple[Tensor, Tensor]:
        """Return two (b or 1, n_q / side, n_k / side) bool tensors: tiles where any pair may, where all pairs do meet.

        The first compares ranges of numbers, so it is exact where segments are numbered in order, and never too small.
        """
        (low_q, high_q), (low_k, high_k) = (ranges(x, side) for x in self)
        low_q, high_q = low_q[:, :, None], high_q[:, :, None]
        low_k, high_k = low_k[:, None], high_k[:, None]
        return (low_q <= high_k) & (low_k <= high_q), (low_q == high_k) & (low_k == high_q)


def ranges(x: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number of every `side` neighbours in x (b, n)."""
    missing = -x.shape[1] % side
    if missing:
        x = torch.cat((x, x[:, -1:].expand(-1, missing)), 1)
    return torch.aminmax(x.unflatten(1, (-1, side)), dim=-1)
