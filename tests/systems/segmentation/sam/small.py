"""A small Segment Anything whose weights all matter, pictures and prompts."""

from __future__ import annotations

import torch
from torch import nn

from volvelle.systems.segmentation.sam import Sam, SamConfig, ViT
from volvelle.systems.segmentation.sam.config import Decoder


def config(size: int = 160, **changes) -> SamConfig:
    """Windows of 4 in a grid of 10: the last ones are padded."""
    return SamConfig(
        "small", ViT(48, 3, 4, (1,), window=4, mlp=96), size, width=64, decoder=Decoder(mlp=128), **changes
    )


def model(seed: int = 0, size: int = 160) -> Sam:
    torch.manual_seed(seed)
    net = Sam(config(size)).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def prompts(size: int = 160, k: int = 5, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(1, k, 2, generator=generator) * size / 2
    return {
        "points": torch.rand(1, k, 3, 2, generator=generator) * size,
        "labels": torch.randint(0, 2, (1, k, 3), generator=generator),
        "boxes": torch.cat((corners, corners + 20), -1),
        "masks": torch.randn(1, k, size // 4, size // 4, generator=generator),
    }


KINDS = {
    "points": ("points", "labels"),
    "boxes": ("boxes",),
    "points and boxes": ("points", "labels", "boxes"),
    "points and masks": ("points", "labels", "masks"),
    "masks": ("masks",),
    "all": ("points", "labels", "boxes", "masks"),
}
