"""How a region is cut out of a map: RoIAlign, and position-sensitive with a map for each bin.

All give (r, c, k, k) for regions (r, 5) and are asked as pool(maps, regions, features): `features` are what the maps
were made of, which only pools that move their bins look at.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from volvelle.parts.convolution.separable import PointwiseConv2d
from volvelle.parts.regions.deform_roi_pool import deform_ps_roi_pool
from volvelle.parts.regions.ps_roi_align import ps_roi_align
from volvelle.parts.regions.roi_align import roi_align
from volvelle.systems.detection.config import Convention, Reduce

SAMPLES = 2
"""Samples of a bin on each axis."""


class Align(nn.Module):
    """RoIAlign: He et al. 2017, "Mask R-CNN", section 3."""

    def __init__(self, bins: int, stride: int):
        super().__init__()
        self.bins, self.stride = bins, stride

    def forward(self, maps: Tensor, regions: Tensor, features: Tensor) -> Tensor:
        """(r, c, k, k) of maps (b, c, y, x)."""
        return roi_align(maps, regions, (self.bins, self.bins), 1 / self.stride, SAMPLES, True)


class PositionSensitiveAlign(nn.Module):
    """Bin (i, j) reads map (i, j) alone, at bilinear samples: Li et al. 2017, "Light-Head R-CNN"; ThunderNet."""

    def __init__(self, bins: int, stride: int, *, reduce: Reduce = "mean", convention: Convention = "torchvision"):
        super().__init__()
        self.bins, self.stride = bins, stride
        self.reduce: Reduce = reduce
        self.convention: Convention = convention

    def forward(self, maps: Tensor, regions: Tensor, features: Tensor) -> Tensor:
        """(r, c, k, k) of maps (b, c k², y, x)."""
        size = (self.bins, self.bins)
        return ps_roi_align(
            maps, regions, size, 1 / self.stride, SAMPLES, reduce=self.reduce, convention=self.convention
        )


class DeformedPool(nn.Module):
    """A position-sensitive pool whose bins move: Dai et al. 2017, "Deformable Convolutional Networks", section 2.2.

    Offsets, as shares of the region, are pooled by position from 2 k² maps of the features (equation 8): zero at first.
    """

    def __init__(
        self,
        pool: PositionSensitiveAlign,
        channels: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.pool = pool
        self.offset = PointwiseConv2d(channels, 2 * pool.bins**2, device=device, dtype=dtype)
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, maps: Tensor, regions: Tensor, features: Tensor) -> Tensor:
        """(r, c, k, k) of maps (b, c k², y, x), its bins moved by what the features say."""
        pool = self.pool
        size, scale = (pool.bins, pool.bins), 1 / pool.stride
        offset = ps_roi_align(self.offset(features), regions, size, scale, SAMPLES)
        return deform_ps_roi_pool(
            maps, regions, offset, size, scale, SAMPLES, reduce=pool.reduce, convention=pool.convention
        )
