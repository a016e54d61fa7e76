"""A few bilinear samples in each bin of a region, and their mean or maximum: what RoIAlign and its relatives share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from volvelle.parts.regions.taps import Taps, crossed, read, weighted_rows

Reduce = Literal["mean", "max"]


def grid(start: Tensor, size: Tensor, bins: int, samples: int) -> Tensor:
    """Where `samples` points lie in each of `bins`, (r, bins, samples), for starts and sizes (r) of a bin.

    start + size (p + (i + 1/2) / samples)
    """
    points = torch.arange(samples, device=start.device, dtype=start.dtype) + 0.5
    first = start[:, None] + size[:, None] * torch.arange(bins, device=start.device, dtype=start.dtype)
    return first[:, :, None] + points * (size / samples)[:, None, None]


def pooled(table: Tensor, first: Tensor, y: Taps, x: Taps, width: int, reduce: Reduce, inside: bool = False) -> Tensor:
    """The mean or maximum over samples y and x, (r, k_y, k_x, s, 2) that broadcast: (r, k_y, k_x, c).

    Samples outside are zero, or with `inside` left out; bins without any sample are zero. The rest as in `read`.
    """
    if reduce == "mean":
        return read(table, first, _mean(y, inside), _mean(x, inside), width)
    each_y = Taps(y.at[..., :, None, :], y.weight[..., :, None, :])
    each_x = Taps(x.at[..., None, :, :], x.weight[..., None, :, :])
    taps = crossed(first[..., None, None], each_y, each_x, width, table.shape[0] - 1)
    found = weighted_rows(table, Taps(taps.at.flatten(5), taps.weight.flatten(5)))  # (r, k_y, k_x, s, s, c)
    if not inside:
        return found.amax((3, 4))
    there = ((each_y.at[..., 0] >= 0) & (each_x.at[..., 0] >= 0))[..., None]
    best = torch.where(there, found, -torch.inf).amax((3, 4))
    return torch.where(there.any(3).any(3), best, 0.0)


def _mean(taps: Taps, inside: bool) -> Taps:
    number = taps.at.shape[3]
    if inside:
        number = (taps.at[..., 0] >= 0).sum(-1).clamp(min=1)[..., None]
    return Taps(taps.at.flatten(3), taps.weight.flatten(3) / number)
