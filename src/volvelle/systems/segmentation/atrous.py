"""Atrous segmenters: a pyramid of rates side by side (DeepLab), or rates one behind the other (Dilation8).

ASPP: Chen et al. 2017, "Rethinking Atrous Convolution for Semantic Image Segmentation", section 3.3; its decoder: Chen
et al. 2018, "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", section 3.1.
Context: Yu & Koltun 2016, "Multi-Scale Context Aggregation by Dilated Convolutions", section 3 and table 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from volvelle.parts.convolution.atrous import AtrousConv2d
from volvelle.systems.blocks import conv_norm, like
from volvelle.systems.segmentation import config as c


class ASPPDecoder(nn.Module):
    """1 x 1, atrous 3 x 3 at each rate, and the picture's mean, side by side; then joined, and sharpened at stride 4.

    Rates are meant for output stride 16; DeepLab doubles them at 8. The branch of the mean has a bias in place of batch
    normalisation, so that a batch of one can be trained.
    """

    def __init__(self, config: c.ASPP, channels: Sequence[int], classes: int):
        super().__init__()
        deep, width = channels[-1], config.width
        self.branches = nn.ModuleList([conv_norm(deep, width, 1)])
        self.branches.extend(conv_norm(deep, width, 3, rate=rate) for rate in config.rates)
        self.mean = nn.Sequential(AtrousConv2d(deep, width, 1), nn.ReLU(inplace=True))
        self.join = conv_norm(width * (len(config.rates) + 2), width, 1)
        self.low = conv_norm(channels[0], config.low, 1) if config.low else None
        self.sharpen = nn.Sequential(conv_norm(width + config.low, width), conv_norm(width, width))
        self.classify = AtrousConv2d(width, classes, 1)

    def forward(self, features: Sequence[Tensor], x: Tensor) -> Tensor:
        """Scores at stride 4, or at the last map's stride without `low`."""
        deep = features[-1]
        whole = like(self.mean(deep.mean((2, 3), keepdim=True)), deep)
        joined = self.join(torch.cat([*(branch(deep) for branch in self.branches), whole], 1))
        if self.low is not None:
            low = self.low(features[0])
            joined = torch.cat([like(joined, low), low], 1)
        return self.classify(self.sharpen(joined))


class ContextDecoder(nn.Module):
    """Scores of the last map, then 3 x 3 convolutions of growing rates that keep size and channels, then 1 x 1.

    They begin as the identity (section 3), so that what the encoder says is passed on before anything is learnt.
    """

    def __init__(self, config: c.Context, channels: Sequence[int], classes: int):
        super().__init__()
        self.front = AtrousConv2d(channels[-1], classes, 1)
        self.layers = nn.ModuleList([AtrousConv2d(classes, classes, 3, dilation=rate) for rate in config.rates])
        self.classify = AtrousConv2d(classes, classes, 1)
        for layer in (*self.layers, self.classify):
            assert isinstance(layer, AtrousConv2d)
            nn.init.dirac_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor], x: Tensor) -> Tensor:
        """Scores at the last map's stride."""
        scores = self.front(features[-1])
        for layer in self.layers:
            scores = layer(scores).relu()
        return self.classify(scores)
