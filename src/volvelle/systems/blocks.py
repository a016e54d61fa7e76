"""What the systems for dense vision share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from volvelle.parts.convolution.atrous import AtrousConv2d


def like(x: Tensor, other: Tensor) -> Tensor:
    """Resize x (b, c, y, x) bilinearly to the other's height and width; without a branch, so that it can be traced."""
    return F.interpolate(x, size=other.shape[-2:], mode="bilinear", align_corners=False)


def conv_norm(in_channels: int, out_channels: int, kernel: int = 3, *, stride: int = 1, rate: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    conv = AtrousConv2d(in_channels, out_channels, kernel, stride=stride, dilation=rate, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))
