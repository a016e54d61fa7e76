"""Fully convolutional network: Long et al. 2015, "Fully Convolutional Networks for Semantic Segmentation", section 4.

Scores of the last map, doubled and added to scores of the map before it, down to stride 16 or 8 (FCN-32s, -16s, -8s).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from volvelle.errors import UsageError
from volvelle.parts.convolution.atrous import AtrousConv2d
from volvelle.systems.blocks import like
from volvelle.systems.segmentation.config import FCN


class FCNDecoder(nn.Module):
    """A 1 x 1 classifier a map, and sums from coarse to fine."""

    def __init__(self, config: FCN, channels: Sequence[int], classes: int):
        super().__init__()
        used = {32: 1, 16: 2, 8: 3}.get(config.finest)
        if used is None:
            raise UsageError(f"fcn: finest must be 32, 16 or 8, got {config.finest}")
        self.classify = nn.ModuleList([AtrousConv2d(c, classes, 1) for c in channels[-used:]])
        for layer in self.classify[:-1]:
            # The paper's skips begin at zero: FCN-16s starts as what FCN-32s is.
            assert isinstance(layer, AtrousConv2d)
            nn.init.zeros_(layer.weight)

    def forward(self, features: Sequence[Tensor], x: Tensor) -> Tensor:
        """Scores at the stride of the finest map used."""
        used = features[-len(self.classify) :]
        scores = self.classify[-1](used[-1])
        for i in reversed(range(len(used) - 1)):
            finer = self.classify[i](used[i])
            scores = like(scores, finer) + finer
        return scores
