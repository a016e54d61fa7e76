"""U-Net: Ronneberger et al. 2015, "U-Net: Convolutional Networks for Biomedical Image Segmentation", figure 1.

The expanding half on any encoder: double the map, put the encoder's map of that size beside it, two 3 x 3 convolutions.
Batch normalisation and padding, which later U-Nets have, keep the size of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from volvelle.parts.convolution.atrous import AtrousConv2d
from volvelle.systems.blocks import conv_norm, like
from volvelle.systems.segmentation.config import UNet


class UNetDecoder(nn.Module):
    """Three doublings, to the encoder's finest map."""

    def __init__(self, config: UNet, channels: Sequence[int], classes: int):
        super().__init__()
        widths = [config.width << i for i in range(len(channels) - 1)]
        below = [*widths[1:], channels[-1]]
        self.stages = nn.ModuleList(
            nn.Sequential(conv_norm(deeper + skip, width), conv_norm(width, width))
            for width, deeper, skip in zip(widths, below, channels[:-1], strict=True)
        )
        self.classify = AtrousConv2d(widths[0], classes, 1)

    def forward(self, features: Sequence[Tensor], x: Tensor) -> Tensor:
        """Scores at the finest map's stride."""
        deep = features[-1]
        for i in reversed(range(len(self.stages))):
            deep = self.stages[i](torch.cat([like(deep, features[i]), features[i]], 1))
        return self.classify(deep)
