"""The convolutional encoder and decoder of VQGAN, with the names of taming-transformers' tensors.

Esser et al. 2021, table 7. Residual blocks of group norm, SiLU and convolution; halving by a convolution of stride 2
over a map padded right and below; doubling by nearest neighbours and a convolution; attention with one head over all
places.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from volvelle.parts.attention.attention import attention
from volvelle.systems.generation.config import VQGANConfig

EPS = 1e-6
"""Of all group norms, in all files."""


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 x 1 convolution beside it where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, in_channels, y, x) to (b, out_channels, y, x)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """x + attention over all places, with one head as wide as the map."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, c, y, x) to the same shape."""
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))  # (b, 1, y x, c)
        mixed = attention(q, k, v)
        return x + self.proj_out(mixed[:, 0].mT.reshape(x.shape))


class Downsample(nn.Module):
    """Half the height and width."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, c, y, x) to (b, c, y / 2, x / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the height and width."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, c, y, x) to (b, c, 2 y, 2 x)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """Blocks of one size, each perhaps with attention behind it, and then what changes the size."""

    def __init__(self, widths: list[int], groups: int, attends: bool):
        super().__init__()
        pairs = pairwise(widths)
        self.block = nn.ModuleList([ResnetBlock(before, after, groups) for before, after in pairs])
        self.attn = nn.ModuleList([AttnBlock(width, groups) for width in widths[1:]] if attends else [])

    def blocks(self, x: Tensor) -> Tensor:
        """The level without what changes its size."""
        for number, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        return x


class _Down(_Level):
    def __init__(self, widths: list[int], groups: int, attends: bool, halves: bool):
        super().__init__(widths, groups, attends)
        if halves:
            self.downsample = Downsample(widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return self.downsample(x) if hasattr(self, "downsample") else x


class _Up(_Level):
    def __init__(self, widths: list[int], groups: int, attends: bool, doubles: bool):
        super().__init__(widths, groups, attends)
        if doubles:
            self.upsample = Upsample(widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class _Middle(nn.Module):
    """Two blocks around attention, at the smallest size."""

    def __init__(self, width: int, groups: int, attends: bool):
        super().__init__()
        self.block_1 = ResnetBlock(width, width, groups)
        self.attn_1 = AttnBlock(width, groups) if attends else nn.Identity()
        self.block_2 = ResnetBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pictures (b, channels, y, x) to maps (b, latent, y / factor, x / factor)."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.width * m for m in (1, *config.multipliers)]
        last, groups = len(config.multipliers) - 1, config.groups
        self.conv_in = nn.Conv2d(config.channels, config.width, 3, padding=1)
        self.down = nn.ModuleList(
            _Down([widths[i], *[widths[i + 1]] * config.depth], groups, i in config.attention, i < last)
            for i in range(last + 1)
        )
        self.mid = _Middle(widths[-1], groups, config.middle_attention)
        self.norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Encode."""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Maps (b, latent, h, w) to pictures (b, channels, factor h, factor w); each level has one block more."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.width * m for m in (*config.multipliers, config.multipliers[-1])]
        groups = config.groups
        self.conv_in = nn.Conv2d(config.latent, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1], groups, config.middle_attention)
        self.up = nn.ModuleList(
            _Up([widths[i + 1], *[widths[i]] * (config.depth + 1)], groups, i in config.attention, i > 0)
            for i in range(len(config.multipliers))
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], EPS)
        self.conv_out = nn.Conv2d(widths[0], config.channels, 3, padding=1)

    def features(self, z: Tensor) -> Tensor:
        """All but the last convolution: (b, width · multipliers[0], factor h, factor w)."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return F.silu(self.norm_out(h))

    def forward(self, z: Tensor) -> Tensor:
        """Decode."""
        return self.conv_out(self.features(z))


@torch.no_grad()
def quieten(decoder: Decoder) -> None:
    """Begin with the data's mean: a last convolution a tenth as large makes a first picture of grey, not of noise."""
    decoder.conv_out.weight.mul_(0.1)
