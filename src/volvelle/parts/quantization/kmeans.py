"""K-means, to begin a codebook where the vectors are: Lloyd 1982, "Least Squares Quantization in PCM".

Shapes: vectors (n, d), centres (k, d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from volvelle.export import export
from volvelle.parts.quantization.nearest import nearest_code

GROUPS = 16
"""Groups in which many first centres are drawn."""


@export("functional.kmeans")
def kmeans(vectors: Tensor, k: int, *, iterations: int = 10, generator: torch.Generator | None = None) -> Tensor:
    """Centres (k, d) of k clusters: each the mean of the vectors (n, d) nearest to it, after so many rounds.

    They begin as rows drawn one after the other, many centres in groups, with a chance in proportion to the squared
    distance from those drawn before (Arthur & Vassilvitskii 2007, "k-means++"). A centre that no vector is nearest to
    moves to a row drawn in this way. Sums are in fp64, results in the vectors' format. Raises ValueError for fewer
    vectors than centres.

    >>> points = torch.tensor([[0.0], [0.2], [9.0], [9.2]])
    >>> [round(value, 3) for value in sorted(kmeans(points, 2).flatten().tolist())]
    [0.1, 9.1]
    """
    if vectors.ndim != 2 or not 1 <= k <= len(vectors) or iterations < 0:
        raise ValueError(
            f"kmeans: vectors (n, d), 1 <= k <= n and iterations >= 0 are wanted, got {tuple(vectors.shape)}, k={k} "
            f"and iterations={iterations}"
        )
    points = vectors.detach().double()
    centres = _first(points, k, generator)
    for _ in range(iterations):
        near = nearest_code(points.float(), centres.float())
        counts = torch.bincount(near, minlength=k)
        sums = torch.zeros_like(centres).index_add_(0, near, points)
        empty = (counts == 0).nonzero()[:, 0]
        apart = (points - centres[near]).square().sum(1)
        centres = sums / counts.clamp_min(1)[:, None]
        if len(empty):
            centres[empty] = points[_drawn(apart, len(empty), generator)]
    return centres.to(vectors.dtype)


def _first(points: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """So many rows, each drawn far from those before; of many centres a sixteenth at a time."""
    apart = points.new_ones(len(points))
    centres = points[:0]
    while len(centres) < k:
        count = min(k - len(centres), max(1, k // GROUPS)) if len(centres) else 1
        fresh = points[_drawn(apart, count, generator)]
        near = (points - fresh[nearest_code(points.float(), fresh.float())]).square().sum(1)
        apart = torch.minimum(apart, near) if len(centres) else near
        centres = torch.cat((centres, fresh))
    return centres


def _drawn(chances: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Numbers of rows, all different; where too few have a chance any will do."""
    chances = chances if int((chances > 0).sum()) >= count else torch.ones_like(chances)
    return torch.multinomial(chances.cpu(), count, generator=generator).to(chances.device)
