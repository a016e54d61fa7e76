"""How far generated pictures are from real ones: Fréchet distance beside its floor, precision and recall."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from volvelle.parts.metrics.frechet import feature_statistics, frechet_distance
from volvelle.parts.metrics.manifold_precision_recall import manifold_precision_recall
from volvelle.systems.generation.extractor import Extractor

NEIGHBOURS = 3
"""k of precision and recall: that of their paper."""


def features_of(
    pictures: Tensor, extractor: Extractor, *, batch: int = 128, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Features (n, d) on the CPU of pictures (n, c, y, x) in [-1, 1]."""
    device = next(extractor.buffers(), torch.empty(0)).device
    found: list[Tensor] = []
    for part in pictures.split(batch):
        found.append(extractor(part.to(device)).cpu())
        if progress is not None:
            progress(sum(map(len, found)), len(pictures))
    return torch.cat(found)


def compared(real: Tensor, fake: Tensor, other: Tensor | None, name: str) -> dict[str, float]:
    """Figures of generated features `fake` (n, d) beside real ones; `other` are those of other real pictures.

    FD-name is the Fréchet distance of `fake` to `real`, "FD-name floor" that of `other` to `real`, which a perfect
    generator would have: the distance is biased by the number of pictures, so all are cut to the same number. Precision
    and recall are left out where there are fewer pictures than neighbours asked for, and all where there are fewer than
    two.
    """
    count = min(len(x) for x in (real, fake, other) if x is not None)
    if count < 2:
        return {}
    real, fake = real[:count], fake[:count]
    statistics = feature_statistics(real)
    figures = {f"FD-{name}": float(frechet_distance(*statistics, *feature_statistics(fake)))}
    if other is not None:
        figures[f"FD-{name} floor"] = float(frechet_distance(*statistics, *feature_statistics(other[:count])))
    if count > NEIGHBOURS:
        shares = manifold_precision_recall(real, fake, NEIGHBOURS)
        figures |= {"precision": float(shares[0]), "recall": float(shares[1])}
    return figures
