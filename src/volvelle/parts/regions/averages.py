"""Means over as many samples as a bin is long, at a cost that does not grow with the bin.

RoIAlign with sampling_ratio <= 0 reads g = ⌈size of a bin⌉ samples an axis. Between two pixels the weight of a sample
is linear in its place, so all samples of a bin between pixels m and m + 1 count by their number and their mean place
alone:

    pixel m gets Σ (1 - f),   pixel m + 1 gets Σ f,   with f = y_i - m over the samples there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from volvelle.parts.regions.taps import Taps

AT_ONCE = 1 << 22
"""Taps that are held at a time where bins may be wide."""


def mean_weights(start: Tensor, size: Tensor, bins: int, n: int) -> Tensor:
    """The mean of each bin as weights of an axis's n pixels, (r, bins, n), for starts and sizes (r) of a bin.

    The samples lie at start + size (p + (i + 1/2) / g), i < g = ⌈size⌉, and meet the border as in `clamped_taps`. Bins
    without size weigh nothing; a NaN gives NaNs on pixel 0.
    """
    count = size.detach().ceil().clamp(min=0)[:, None, None]
    step = size[:, None, None] / count.clamp(min=1)
    step = torch.where(count > 0, step, 1.0)
    first = (start[:, None] + size[:, None] * torch.arange(bins, device=start.device, dtype=start.dtype))[..., None]
    edges = torch.arange(-1, n + 1, device=start.device, dtype=start.dtype)
    before = _before(edges, first, size[:, None, None], count)
    number = before.diff(dim=-1)  # of samples between pixels -1 and 0, 0 and 1, ..., n - 1 and n
    parts = number * (first + step * (before[..., 1:] + before[..., :-1]) / 2 - edges[:-1])
    parts = torch.cat((number[..., :1], parts[..., 1:-1], torch.zeros_like(parts[..., :1])), dim=-1)
    weights = ((number - parts)[..., 1:] + parts[..., :-1]) / count.clamp(min=1)
    bad = weights.isnan().any(-1, keepdim=True)
    first_pixel = torch.arange(n, device=start.device) == 0
    return torch.where(bad, torch.where(first_pixel, torch.nan, 0.0).to(weights.dtype), weights)


@torch.no_grad()
def _before(edges: Tensor, first: Tensor, size: Tensor, count: Tensor) -> Tensor:
    """How many of a bin's samples lie before each edge; the last edge counts samples that lie on it too."""
    last = edges == edges[-1]

    def passed(number: Tensor) -> Tensor:
        place = first + (number + 0.5) * size / count.clamp(min=1)
        return (place < edges) | (last & (place == edges))

    near = ((edges - first) / size * count - 0.5).ceil().clamp(min=0).minimum(count)
    near = torch.where(count > 0, near, 0.0)
    near = near - (~passed(near - 1) & (near > 0)).to(near.dtype)  # a division's rounding is off by one at most
    return near + (passed(near) & (near < count)).to(near.dtype)


def window(weights: Tensor) -> Taps:
    """The pixels (r, bins, t) that have weight, t those of the widest bin; reads the weights (r, bins, n)."""
    n = weights.shape[-1]
    used = weights.detach() != 0
    first = used.byte().argmax(-1)
    width = torch.where(used.any(-1), n - used.byte().flip(-1).argmax(-1) - first, 0)
    t = max(int(width.max()), 1) if width.numel() else 1
    at = first[..., None] + torch.arange(t, device=weights.device)
    gone = at >= first[..., None] + width[..., None]
    at = at.clamp(max=n - 1)
    return Taps(torch.where(gone, -1, at), torch.where(gone, 0.0, weights.gather(-1, at)))


def windows(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, Taps, Taps]]:
    """The windows of weights (r, k_y, y) and (r, k_x, x), for as many regions at a time as memory should hold.

    They come as (r, k_y, 1, t_y) and (r, 1, k_x, t_x).
    """
    y, x = window(rows), window(columns)
    step = max(AT_ONCE // (y.at[0].numel() * x.at[0].numel()), 1) if len(rows) else 1
    if step >= len(rows):
        yield slice(None), *_axes(y, x)
        return
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        yield part, *_axes(window(rows[part]), window(columns[part]))


def _axes(y: Taps, x: Taps) -> tuple[Taps, Taps]:
    return Taps(y.at[:, :, None], y.weight[:, :, None]), Taps(x.at[:, None], x.weight[:, None])
