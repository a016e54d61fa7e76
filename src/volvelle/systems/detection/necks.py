"""What stands between a backbone's maps and the two that look at them: the proposer's map and the head's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from volvelle.parts.convolution.separable import PointwiseConv2d
from volvelle.systems.detection.anchors import mean_within


class ContextEnhancement(nn.Module):
    """Context enhancement module: Qin et al. 2019, "ThunderNet", section 3.3 and figure 4.

        out = w_4 C4 + up(w_5 C5) + w_g mean(C5)

    Each map is brought to `out` channels by a 1 x 1 convolution and enlarged to the finest; the picture's mean reaches
    every place. `channels` are those of the maps used, finest first; `last` is a stage that the deepest one goes
    through first (SNet49's last convolution).
    """

    def __init__(self, channels: Sequence[int], out: int, *, last: nn.Module | None = None):
        super().__init__()
        self.last = last or nn.Identity()
        self.lateral = nn.ModuleList([PointwiseConv2d(count, out) for count in channels])
        self.whole = PointwiseConv2d(channels[-1], out)

    def forward(self, features: Sequence[Tensor], sizes: Tensor, image: Sequence[int]) -> tuple[Tensor, Tensor]:
        """One map for both; the mean is that of each picture's own sizes (b, 2), not of the padding of the `image`."""
        maps = list(features[-len(self.lateral) :])
        maps[-1] = self.last(maps[-1])
        found = self.lateral[0](maps[0]) + self.whole(mean_within(maps[-1], sizes, image))
        for layer, one in zip(self.lateral[1:], maps[1:], strict=True):
            found = found + F.interpolate(layer(one), size=found.shape[-2:], mode="nearest")
        return found, found


class TwoStages(nn.Module):
    """The stage before the last for the proposer; the last, brought to `width` channels, for the head."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.reduce = nn.Sequential(PointwiseConv2d(channels, width), nn.ReLU(inplace=True))
        layer = self.reduce[0]
        assert isinstance(layer, PointwiseConv2d)
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        assert layer.bias is not None
        torch.nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor], sizes: Tensor, image: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Both maps."""
        return features[-2], self.reduce(features[-1])
