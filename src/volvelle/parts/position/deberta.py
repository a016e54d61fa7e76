"""Disentangled attention (He et al. 2021, "DeBERTa", section 3.1, and "DeBERTaV3", for the log buckets of version 2).

    A_ij = (Q_i · K_j  +  Q_i · K^r_δ(i,j)  +  K_j · Q^r_δ(i,j)) / sqrt(3 d)
            content       c2p: content to      p2c: position to
                          position             content
    δ(i, j) = clip(i - j, -k, k - 1) + k,  a row of the 2k relative vectors P;  K^r = P W_{k,r},  Q^r = P W_{q,r}
The divisor counts the terms: sqrt(d), sqrt(2d) or sqrt(3d). Version 1 takes δ as it is. Version 2 first puts distances
into buckets, each its own up to k / 2, logarithmic beyond, and may share the content's projections with P.

The paper (equation 4) writes p2c with δ(j, i). The code that the authors released, its descendants and so every
checkpoint use δ(i, j), the default here; `p2c="paper"` is the equation as printed.

Shapes: b batch, h heads, d features a head, 2k relative vectors.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.position.encoding import Bias, PositionEncoding, distances, exact, widened

P2C = Literal["released", "paper"]
STD = 0.02
"""Of fresh relative vectors."""


def _find_edges(bucket_size: int, max_position: int) -> tuple[int, ...]:
    """Return the least distance of bucket mid + c, c = 1 .. bucket_size - mid, where mid = bucket_size // 2.

    mid + ceil(log(x / mid) / log((M - 1) / mid) * L) >= mid + c, L = mid - 1, is x^L mid^(c-1) > (M - 1)^(c-1) mid^L,
    compared in integers.
    """
    mid = bucket_size // 2
    wide, far = mid - 1, max_position - 1
    edges = []
    for c in range(1, bucket_size - mid + 1):
        left, right = mid ** (c - 1), far ** (c - 1) * mid**wide
        x = round(mid * (far / mid) ** ((c - 1) / wide))
        while x**wide * left > right:
            x -= 1
        while x**wide * left <= right:
            x += 1
        edges.append(x)
    return tuple(edges)


_kept_edges = lru_cache(maxsize=64)(_find_edges)


def _edges(bucket_size: int, max_position: int) -> tuple[int, ...]:
    """Return the edges, found once in eager mode; torch.compile, which sees no cache, makes them a constant."""
    find = _find_edges if torch.compiler.is_compiling() else _kept_edges
    return find(bucket_size, max_position)


@export("functional.deberta_log_buckets")
def deberta_log_buckets(relative_pos: Tensor, bucket_size: int, max_position: int) -> Tensor:
    """Return the bucket of each relative position i - j, from -bucket_size to bucket_size.

    relative_pos is an integer tensor of any shape; the result has its shape and dtype. Up to bucket_size // 2 = mid a
    distance is its own bucket, beyond it is mid + ceil(log(x / mid) / log((max_position - 1) / mid) * (mid - 1)), at
    most bucket_size; the sign is kept. Edges are found in integers, so no rounding moves a distance that lies on one.
    Raises ValueError when bucket_size is below 4 or max_position - 1 not above bucket_size // 2.
    He et al. 2021, code of version 2 (`make_log_bucket_position`).

    >>> deberta_log_buckets(torch.tensor([-600, -3, 0, 4, 5, 16, 31, 32]), 8, 32).tolist()
    [-8, -3, 0, 4, 5, 7, 7, 8]
    """
    mid = bucket_size // 2
    if mid < 2 or max_position - 1 <= mid:
        raise ValueError(
            f"deberta_log_buckets: bucket_size must be at least 4 and max_position above {mid + 1}, "
            f"got {bucket_size} and {max_position}"
        )
    size = relative_pos.abs()
    edges = torch.tensor(_edges(bucket_size, max_position), device=size.device)
    far = mid + torch.bucketize(size.contiguous(), edges, right=True)
    return torch.where(size <= mid, relative_pos, relative_pos.sign() * far).to(relative_pos.dtype)


@export("functional.disentangled_bias")
def disentangled_bias(
    q: Tensor,
    k: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    *,
    pos_key: Tensor | None = None,
    pos_query: Tensor | None = None,
    max_position: int | None = None,
    p2c: P2C = "released",
) -> Tensor:
    """Return (Q_i · K^r_δ(i,j) + K_j · Q^r_δ(i,j)) / sqrt(t d), the score bias of queries at i and keys at j.

    q is (b, h, n_q, d) and k (b, h_kv, n_k, d), not scaled; positions are integers (n_q,) or (b, n_q), and (n_k,) or
    (b, n_k). pos_key K^r (c2p) and pos_query Q^r (p2c) are (h, 2k, d); either may be left out, and t is one more than
    the number given: q · k is scaled by 1 / sqrt(t d) too. `max_position` puts distances into log buckets first
    (version 2). The result is (b, h, n_q, n_k), in fp32 for 16-bit q. Raises ValueError when both tables are missing or
    differ in length. He et al. 2021, section 3.1, equation 4.

    >>> q, k = torch.ones(1, 1, 2, 1), torch.zeros(1, 1, 2, 1)
    >>> table = torch.tensor([[[0.0], [1.0], [2.0], [3.0]]])  # k = 2: distances -2, -1, 0, 1
    >>> disentangled_bias(q, k, torch.arange(2), torch.arange(2), pos_key=table, pos_query=table) * 3**0.5
    tensor([[[[2.0000, 1.0000],
              [3.0000, 2.0000]]]])
    """
    tables = [table for table in (pos_key, pos_query) if table is not None]
    if not tables or len({table.shape[-2] for table in tables}) != 1 or p2c not in {"released", "paper"}:
        raise ValueError(
            "disentangled_bias: give pos_key, pos_query or both, (h, 2k, d) with one k, and p2c 'released' or 'paper', "
            f"got {[tuple(table.shape) for table in tables]} and {p2c!r}"
        )
    q, k = widened(q), widened(k)
    rows, scale = tables[0].shape[-2], ((1 + len(tables)) * q.shape[-1]) ** -0.5
    span = rows // 2
    distance = distances(q_positions, k_positions)
    if max_position is not None:
        distance = deberta_log_buckets(distance, span, max_position)
    index = (distance + span).clamp(0, rows - 1)  # (b or 1, 1, n_q, n_k)
    terms = []
    if pos_key is not None:
        terms.append(_looked_up(q * scale, pos_key, index))
    if pos_query is not None:
        index = index if p2c == "released" else (span - distance).clamp(0, rows - 1)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        terms.append(_looked_up(k * scale, pos_query, index.transpose(-2, -1)).transpose(-2, -1))
    return sum(terms[1:], start=terms[0])


def _looked_up(x: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Return x_n · table[index_nm] for x (b, h, n, d), table (h, 2k, d), index (b or 1, 1, n, m): each product once."""
    with exact(x):
        products = x @ table.to(x.dtype).transpose(-2, -1)  # (b, h, n, 2k)
    return products.gather(-1, index.expand(*products.shape[:-1], -1))


class _DisentangledTerms(Bias):
    def __init__(
        self, pos_key: Tensor | None, pos_query: Tensor | None, max_position: int | None, p2c: P2C, scale: float
    ) -> None:
        self.pos_key, self.pos_query, self.max_position, self.scale = pos_key, pos_query, max_position, scale
        self.p2c: P2C = p2c

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(table for table in (self.pos_key, self.pos_query) if table is not None)

    def tile(self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        return disentangled_bias(
            q,
            k,
            q_positions,
            k_positions,
            pos_key=self.pos_key,
            pos_query=self.pos_query,
            max_position=self.max_position,
            p2c=self.p2c,
        )


class RelativeVectors(PositionEncoding):
    """The relative vectors P (2k, width), of which each layer's `DisentangledBias` makes its terms."""

    def __init__(self, k: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * k, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw them from N(0, 0.02)."""
        nn.init.normal_(self.weight, std=STD)

    def vectors(self) -> Tensor:
        """Return P."""
        return self.weight


@export("nn.DisentangledBias", twin=disentangled_bias)
class DisentangledBias(PositionEncoding):
    """`disentangled_bias` with its relative vectors P (2k, width) and the projections of one layer.

    key is W_{k,r} and query W_{q,r}, each a Linear from width to heads * d: give those of the layer's content to share
    them (version 2's `share_att_key`), or None to leave the term out. Layers share P: pass one `table` to all of them.
    Version 1: k = the largest distance, no `max_position`. Version 2: k = `position_buckets`, with `max_position`.
    With k None the module has no vectors of its own, and `bias` is given them (`RelativeVectors` holds some).
    `bias()` carries the `scale` 1 / sqrt(t d), which `attention` then takes for q · k too.

    >>> key, query = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
    >>> module, q = DisentangledBias(4, key, query, k=8), torch.randn(2, 4, 5, 8)
    >>> module.bias().tile(q, q, torch.arange(5), torch.arange(5)).shape, round(module.bias().scale, 4)
    (torch.Size([2, 4, 5, 5]), 0.2041)
    """

    def __init__(
        self,
        heads: int,
        key: nn.Linear | None,
        query: nn.Linear | None,
        *,
        k: int | None,
        max_position: int | None = None,
        p2c: P2C = "released",
        table: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        given = key if key is not None else query
        if given is None or given.out_features % heads:
            raise ValueError(
                f"DisentangledBias: give key, query or both, Linear layers with {heads} heads, got {given}"
            )
        self.heads, self.max_position = heads, max_position
        self.p2c: P2C = p2c
        self.key, self.query = key, query
        self.scale = ((1 + (key is not None) + (query is not None)) * (given.out_features // heads)) ** -0.5
        if table is None and k is not None:
            table = nn.Parameter(nn.init.normal_(torch.empty(2 * k, given.in_features), std=STD))
        self.table = table

    def reset_parameters(self) -> None:
        """Draw the relative vectors from N(0, 0.02); the projections keep their weights."""
        if self.table is not None:
            nn.init.normal_(self.table, std=STD)

    def _projected(self, layer: nn.Linear | None, table: Tensor) -> Tensor | None:
        """Return P through one projection, (h, 2k, d)."""
        return None if layer is None else layer(table).unflatten(-1, (self.heads, -1)).transpose(0, 1)

    def forward(self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Return the bias (b, h, n_q, n_k)."""
        return self.bias().tile(q, k, q_positions, k_positions)

    def bias(self, vectors: Tensor | None = None) -> Bias:
        """Return the score bias, made of the module's relative vectors or of those given, (2k, width).

        The projections are applied here, once for all blocks.
        """
        table = self.table if vectors is None else vectors
        if table is None:
            raise ValueError("DisentangledBias: built without relative vectors (k=None), so bias must be given them")
        key, query = self._projected(self.key, table), self._projected(self.query, table)
        return _DisentangledTerms(key, query, self.max_position, self.p2c, self.scale)

    def extra_repr(self) -> str:
        """Show the options."""
        k = None if self.table is None else self.table.shape[0] // 2
        return f"{self.heads}, k={k}, max_position={self.max_position}, p2c={self.p2c!r}"
