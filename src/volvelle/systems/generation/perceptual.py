"""A perceptual distance on an image classifier's features, without learned weights and without VGG.

The maps of both pictures at four strides are brought to unit length at every place; the distance is the mean squared
difference, summed over channels and averaged over places and strides. That is the form of Zhang et al. 2018, "The
Unreasonable Effectiveness of Deep Features as a Perceptual Metric", equation 1, with all weights equal; on another
network, so its values are not LPIPS and are never called so.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from volvelle.systems.backbone.load import backbone
from volvelle.systems.backbone.trim import without_classifier

BACKBONE = "efficientnet-lite0"
NAME = "perceptual (EfficientNet-Lite0)"
"""How the distance is called wherever it is shown."""
LEAST = 64
"""Side in pixels below which pictures are enlarged first: the last map has a place for every 32 pixels."""


class Perceptual(nn.Module):
    """The distance (b,) of two batches of pictures (b, 1 or 3, y, x) in [-1, 1]; 0 for equal ones.

    `weights` are those of `volvelle.systems.backbone.backbone`: "imagenet" fetches the known ones. `stages` says how
    many of the four maps are compared, finest first. The network is frozen and stays in evaluation mode.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | None = "imagenet", *, stages: int = 4, least: int = LEAST):
        super().__init__()
        if not 1 <= stages <= 4 or least < 1:
            raise ValueError(f"Perceptual: stages in 1 … 4 and least >= 1 are wanted, got {stages} and {least}")
        net = backbone(BACKBONE, weights=weights)
        how = net.preprocessing
        self.net, self.stages, self.least = without_classifier(net).eval().requires_grad_(False), stages, least
        self.register_buffer("mean", torch.tensor(how.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(how.std).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Perceptual:
        """Nothing: running statistics of the network must not move."""
        return super().train(False)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Maps of unit length at every place, finest first."""
        short = min(pixels.shape[-2:])
        x = pixels.float().expand(-1, 3, -1, -1)
        if short < self.least:
            size = [round(n * self.least / short) for n in pixels.shape[-2:]]
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        maps = self.net.features(((x + 1) / 2 - self.mean) / self.std)[: self.stages]
        return [F.normalize(found.float(), dim=1, eps=1e-6) for found in maps]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The distance of each pair. Gradients go to both."""
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(
                f"Perceptual: two batches (b, 1 or 3, y, x) of one shape are wanted, got {tuple(x.shape)} "
                f"and {tuple(y.shape)}"
            )
        pairs = zip(self.features(x), self.features(y), strict=True)
        each = [(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]
        return torch.stack(each).mean(0)
