"""Reading maps between their pixels: every read is a weighted sum of a few rows of a table of pixels.

    value(y, x) = Σ  max(0, 1 - |y - i|) max(0, 1 - |x - j|) F[i, j]          (bilinear: two rows, two columns)

A map (b, c, y, x) becomes the table (b y x + 1, c) of its pixels, the last row zero; a read is a list of row numbers
and weights, its taps, and `weighted_rows` sums them up. Positions meet the map in the weights alone, so gradients for
boxes and offsets are plain autograd over small tensors. No read touches a pixel that it does not need: a NaN in the
map stays where it is, and one in a position stays in its own result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from volvelle.parts.regions.boxes import wide
from volvelle.parts.regions.rows import row_sums


class Taps(NamedTuple):
    """Numbers of pixels along one axis, int64, and their weights; -1 where the read lies outside and counts as zero."""

    at: Tensor
    weight: Tensor


def clamped_taps(position: Tensor, n: int) -> Taps:
    """Two pixels for each position on an axis of n, (..., 2): RoIAlign's reading of the border.

    Positions in [-1, 0] read the first pixel, those in [n - 1, n] the last, all beyond read zero.
    """
    outside = (position < -1) | (position > n)
    inner = position.clamp(0, n - 1)
    low = _floor(inner).clamp(0, n - 1)
    part = inner - low
    at = torch.stack((low, (low + 1).clamp(max=n - 1)), dim=-1)
    weight = torch.stack((1 - part, part), dim=-1)
    gone = outside[..., None]
    return Taps(torch.where(gone, -1, at), torch.where(gone, 0.0, weight))


def zero_taps(position: Tensor, n: int) -> Taps:
    """Two pixels for each position on an axis of n, (..., 2), pixels outside being zero."""
    inner = position.clamp(-1, n)
    low = _floor(inner).clamp(-1, n)
    part = inner - low
    at = torch.stack((low, low + 1), dim=-1)
    gone = (at < 0) | (at >= n)
    weight = torch.stack((1 - part, part), dim=-1)
    return Taps(torch.where(gone, -1, at), torch.where(gone & ~weight.isnan(), 0.0, weight))


def half_pixel_taps(position: Tensor, n: int) -> Taps:
    """Two pixels for each position on an axis of n, (..., 2), of which those beyond [-1/2, n - 1/2] weigh nothing."""
    taps = clamped_taps(position, n)
    gone = ((position < -0.5) | (position > n - 0.5))[..., None]
    return Taps(torch.where(gone, -1, taps.at), torch.where(gone, 0.0, taps.weight))


def _floor(position: Tensor) -> Tensor:
    return position.detach().nan_to_num(0.0).floor().long()


def read(table: Tensor, first: Tensor, y: Taps, x: Taps, width: int) -> Tensor:
    """Sums over rows y (r, k_y, k_x, t_y) times columns x (r, k_y, k_x, t_x) of maps: (r, k_y, k_x, c).

    Either may be of length 1 where the other is not. `first` says in which row of the table a map's pixel (0, 0) lies,
    (r, 1 or k_y, 1 or k_x), `width` how long its rows are. What lies outside is read from the table's last row.
    """
    taps = crossed(first, y, x, width, table.shape[0] - 1)
    return weighted_rows(table, Taps(taps.at.flatten(3), taps.weight.flatten(3)))


def crossed(first: Tensor, y: Taps, x: Taps, width: int, none: int) -> Taps:
    """The taps of `read`, (r, k_y, k_x, t_y, t_x); those outside are row `none`."""
    rows, columns = y.at[..., :, None], x.at[..., None, :]
    at = torch.where((rows < 0) | (columns < 0), none, first[..., None, None] + rows * width + columns)
    return Taps(at, y.weight[..., :, None] * x.weight[..., None, :])


def pixel_table(maps: Tensor) -> Tensor:
    """The pixels of maps (b, g, c, y, x) as rows (b g y x + 1, c), at least fp32, the last row zero."""
    b, g, c, y, x = maps.shape
    return F.pad(wide(maps).permute(0, 1, 3, 4, 2).reshape(b * g * y * x, c), (0, 0, 0, 1))


def weighted_rows(table: Tensor, taps: Taps) -> Tensor:
    """Return Σ_t weight[.., t] table[at[.., t]], (..., c) for taps (..., t): with first and second derivatives."""
    shape = taps.at.shape
    at, weight = taps.at.reshape(-1, shape[-1]), taps.weight.to(table.dtype).expand(shape).reshape(-1, shape[-1])
    return row_sums(table, at, weight).view(*shape[:-1], table.shape[1])
