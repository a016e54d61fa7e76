"""T5's relative bias (Raffel et al. 2020, "Exploring the limits of transfer learning", section 2.1): one trained number
a head for each bucket of distances.

    softmax_j(q_i · k_j + B[bucket(j - i), h])
Small distances have a bucket each; larger ones share buckets whose width grows logarithmically up to `max_distance`,
and everything beyond shares the last. In both directions half of the buckets serve keys after the query. T5 does not
scale q · k: attend with scale=1.0 to run its checkpoints.

Bucket edges are found in integers, so that no rounding of a logarithm decides where a distance on an edge belongs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from volvelle.export import export
from volvelle.parts.position.encoding import DistanceBias, PositionEncoding, distances


def _find_edges(buckets: int, max_distance: int) -> tuple[int, ...]:
    """Return the least distance of each bucket but the first, for one direction.

    Bucket e + c, e = buckets // 2, begins at the least x with e + floor(log(x / e) / log(M / e) * L) >= e + c, where
    L = buckets - e: that is x^L >= M^c e^(L - c), compared in integers.
    """
    exact = buckets // 2
    wide = buckets - exact
    edges = list(range(1, exact + 1))
    for c in range(1, wide):
        bound = max_distance**c * exact ** (wide - c)
        x = round(exact * (max_distance / exact) ** (c / wide))
        while x**wide >= bound:
            x -= 1
        while x**wide < bound:
            x += 1
        edges.append(x)
    return tuple(edges)


_kept_edges = lru_cache(maxsize=64)(_find_edges)


def _edges(buckets: int, max_distance: int) -> tuple[int, ...]:
    """Return the edges, found once in eager mode; torch.compile, which sees no cache, makes them a constant."""
    find = _find_edges if torch.compiler.is_compiling() else _kept_edges
    return find(buckets, max_distance)


@export("functional.t5_relative_buckets", stable=True)
def t5_relative_buckets(
    relative_position: Tensor, bidirectional: bool = True, num_buckets: int = 32, max_distance: int = 128
) -> Tensor:
    """Return the bucket of each relative position j - i (key minus query).

    relative_position is an integer tensor of any shape; the result is int64 of the same shape, 0 .. num_buckets - 1.
    In one direction, keys after the query share bucket 0 with the query itself. Names and meaning as in transformers.
    Raises ValueError when there are too few buckets, or max_distance is not above the exact ones.
    Raffel et al. 2020, section 2.1.

    >>> t5_relative_buckets(torch.tensor([-200, -9, -1, 0, 1, 9, 200])).tolist()
    [15, 8, 1, 0, 17, 24, 31]
    >>> t5_relative_buckets(torch.tensor([-200, -17, -1, 0, 1]), bidirectional=False).tolist()
    [31, 16, 1, 0, 0]
    """
    buckets = num_buckets // 2 if bidirectional else num_buckets
    if buckets < 2 or max_distance <= buckets // 2:
        raise ValueError(
            f"t5_relative_buckets: needs at least {4 if bidirectional else 2} buckets and max_distance above "
            f"{max(buckets // 2, 1)}, got num_buckets {num_buckets} and max_distance {max_distance}"
        )
    edges = torch.tensor(_edges(buckets, max_distance), device=relative_position.device)
    size = relative_position.abs() if bidirectional else (-relative_position).clamp(min=0)
    bucket = torch.bucketize(size.contiguous(), edges, right=True)
    return torch.where(relative_position > 0, bucket + buckets, bucket) if bidirectional else bucket


class _BucketBias(DistanceBias):
    def __init__(self, weight: Tensor, bidirectional: bool, max_distance: int) -> None:
        self.weight, self.bidirectional, self.max_distance = weight, bidirectional, max_distance

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def at(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        bucket = t5_relative_buckets(-distance, self.bidirectional, self.weight.shape[0], self.max_distance)
        weight = self.weight.to(dtype)
        if bucket.device.type == "cpu":  # heads first in memory: the fused kernel is twice as fast on it
            return weight.t().index_select(1, bucket.flatten()).unflatten(1, bucket.shape)
        return functional.embedding(bucket, weight).movedim(-1, 0)  # whose gradient is summed in a fixed order on CUDA


@export("functional.t5_bias")
def t5_bias(
    q_positions: Tensor,
    k_positions: Tensor,
    weight: Tensor,
    *,
    bidirectional: bool = True,
    max_distance: int = 128,
) -> Tensor:
    """Return B[bucket(j - i), h], the score bias of queries at i and keys at j.

    Positions are integers (n_q,) or (b, n_q), and (n_k,) or (b, n_k); weight is (buckets, h); the result is (b or 1, h,
    n_q, n_k) in its dtype. Raffel et al. 2020, section 2.1.

    >>> t5_bias(torch.tensor([1]), torch.arange(3), torch.tensor([[0.0], [1.0], [2.0], [3.0]]), max_distance=4)
    tensor([[[[1., 0., 3.]]]])
    """
    bias = _BucketBias(weight, bidirectional, max_distance)
    return bias.at(distances(q_positions, k_positions)[:, 0], weight.dtype).transpose(0, 1)


@export("nn.T5Bias", twin=t5_bias)
class T5Bias(PositionEncoding):
    """`t5_bias` with its weight (buckets, heads): T5's `relative_attention_bias.weight`, shared by all layers.

    >>> module, q = T5Bias(8), torch.randn(2, 8, 5, 16)
    >>> module.bias().tile(q, q, torch.arange(5), torch.arange(5)).shape
    torch.Size([1, 8, 5, 5])
    """

    def __init__(self, heads: int, *, buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> None:
        super().__init__()
        t5_relative_buckets(torch.zeros(1, dtype=torch.int64, device="cpu"), bidirectional, buckets, max_distance)
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 0.02)."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Return the bias (b or 1, h, n_q, n_k)."""
        return t5_bias(
            q_positions,
            k_positions,
            self.weight,
            bidirectional=self.bidirectional,
            max_distance=self.max_distance,
        )

    def bias(self) -> DistanceBias:
        """Return the score bias."""
        return _BucketBias(self.weight, self.bidirectional, self.max_distance)

    def extra_repr(self) -> str:
        """Show the options."""
        buckets, heads = self.weight.shape
        return f"{heads}, buckets={buckets}, max_distance={self.max_distance}, bidirectional={self.bidirectional}"
