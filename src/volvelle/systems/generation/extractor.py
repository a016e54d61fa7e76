"""What turns pictures into features, for distances between sets of them: of our own, by name, folder or run.

A distance depends on its features, so its label carries the extractor's name: FD-efficientnet-lite0-64, never FID.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.errors import UsageError
from volvelle.hub import ASSETS
from volvelle.systems.backbone.load import backbone, read_backbone
from volvelle.systems.backbone.model import Backbone
from volvelle.systems.backbone.names import find_config
from volvelle.systems.backbone.trim import without_classifier

PIXELS = "pixels"
SIDE = 64
"""Side in pixels to which smaller pictures are enlarged: a last map of 2 x 2."""


class Extractor(nn.Module):
    """Features (b, d) of pictures (b, 1 or 3, y, x) in [-1, 1]; `name` belongs to every figure made with them."""

    name: str

    def forward(self, pictures: Tensor) -> Tensor:
        """Features of a batch, without gradients."""
        raise NotImplementedError


class PixelFeatures(Extractor):
    """Means of 8 x 8 fields, for each channel: what is where, coarsely. Needs no weights.

    >>> PixelFeatures()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 64])
    """

    def __init__(self, fields: int = 8):
        super().__init__()
        self.fields, self.name = fields, f"{PIXELS}-{fields}"

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Features of a batch, without gradients."""
        return F.adaptive_avg_pool2d(pictures.float(), self.fields).flatten(1)


class BackboneFeatures(Extractor):
    """The mean over places of a classifier's last map, of pictures resized to `side` pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: Backbone, name: str, side: int):
        super().__init__()
        how = net.preprocessing
        self.net, self.side, self.name = without_classifier(net).eval().requires_grad_(False), side, f"{name}-{side}"
        self.register_buffer("mean", torch.tensor(how.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(how.std).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> BackboneFeatures:
        """Nothing: running statistics of the network must not move."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Features of a batch, without gradients."""
        x = (pictures.float().expand(-1, 3, -1, -1) + 1) / 2
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        return self.net.features((x - self.mean) / self.std)[-1].float().mean((2, 3))


def open_extractor(name: str | os.PathLike[str], *, size: int) -> Extractor:
    """The extractor for pictures of `size` pixels: "pixels", a backbone with known weights, or a classifier's folder.

    A folder is one of `write_backbone`, or a run of `train classify`. Raises UsageError for a name that is not known,
    and for a network without known weights.
    """
    path = Path(name)
    if path.is_dir():
        net = read_backbone(path / "weights" if (path / "manifest.json").is_file() else path)
        return BackboneFeatures(net, path.resolve().name, net.preprocessing.size)
    if str(name) == PIXELS:
        return PixelFeatures()
    config = find_config(str(name))
    known = [asset.name for asset in ASSETS.values() if asset.kind == "image backbone"]
    if config.name not in known:
        tip = f"{PIXELS}, {', '.join(known)}, or a run of train classify"
        raise UsageError(f"extractor={name}: no weights are known for this network", tip=tip)
    return BackboneFeatures(backbone(config.name, weights="imagenet"), config.name, max(SIDE, size))
