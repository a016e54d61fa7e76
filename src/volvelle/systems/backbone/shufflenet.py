"""ShuffleNetV2: Ma et al. 2018, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", figure 3;
and SNet: Qin et al. 2019, "ThunderNet: Towards Real-time Generic Object Detection", section 3.1.

A block splits the channels, changes one half, joins the halves and shuffles, so that the next split mixes them. SNet is
the same network with depthwise kernels of 5, for larger receptive fields, and other widths. torchvision's layer names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from volvelle.parts.convolution.inverted_residual import convolution
from volvelle.systems.backbone.config import OutputStride, ShuffleConfig
from volvelle.systems.backbone.model import Backbone, Strides, initialise


def shuffle(x: Tensor, groups: int = 2) -> Tensor:
    """Interleave the groups' channels: of (b, c, y, x), channel j of group i comes to j · groups + i.

    >>> shuffle(torch.arange(6.0).view(1, 6, 1, 1)).flatten()
    tensor([0., 3., 1., 4., 2., 5.])
    """
    b, c, high, wide = x.shape
    return x.view(b, groups, c // groups, high, wide).transpose(1, 2).reshape(b, c, high, wide)


def _conv(channels: int, out: int, kernel: int = 1, stride: int = 1, **options: int) -> list[nn.Module]:
    return [convolution(channels, out, kernel, stride, padding="symmetric", **options), nn.BatchNorm2d(out)]


def _depthwise(channels: int, kernel: int, stride: int, dilation: int) -> list[nn.Module]:
    return _conv(channels, channels, kernel, stride, dilation=dilation, groups=channels)


class ShuffleBlock(nn.Module):
    """One block; where the channels change, both branches see all of them and both may have the stride."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, dilation: int):
        super().__init__()
        half = out // 2
        self.splits = channels == out
        seen = half if self.splits else channels
        if self.splits:
            self.branch1 = nn.Sequential()
        else:
            first = [*_depthwise(channels, kernel, stride, dilation), *_conv(channels, half), nn.ReLU(inplace=True)]
            self.branch1 = nn.Sequential(*first)
        self.branch2 = nn.Sequential(
            *_conv(seen, half), nn.ReLU(inplace=True),
            *_depthwise(half, kernel, stride, dilation),
            *_conv(half, half), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, channels, y, x) to (b, out, ⌈y / stride⌉, ⌈x / stride⌉)."""
        one, other = x.chunk(2, 1) if self.splits else (self.branch1(x), x)
        return shuffle(torch.cat((one, self.branch2(other)), 1))


class ShuffleNet(Backbone):
    """A strided stem and a pooling, three stages of blocks, perhaps a 1 x 1 head (a `ShuffleConfig`).

    The map at stride 4 is that of the pooling.
    """

    classifier_name = "fc"

    def __init__(self, config: ShuffleConfig, *, output_stride: OutputStride = 32):
        super().__init__(config, (config.stem, *config.channels), output_stride)
        self.conv1 = nn.Sequential(*_conv(3, config.stem, 3, 2), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        strides, channels = Strides(output_stride, 4), config.stem
        stages: list[nn.Sequential] = []
        for out, depth in zip(config.channels, config.depths, strict=True):
            blocks = nn.Sequential()
            for number in range(depth):
                stride, dilation = strides.step(1 if number else 2)
                blocks.append(ShuffleBlock(channels, out, config.kernel, stride, dilation))
                channels = out
            stages.append(blocks)
        self.stage2, self.stage3, self.stage4 = stages
        head = [*_conv(channels, config.head), nn.ReLU(inplace=True)] if config.head else []
        self.conv5 = nn.Sequential(*head)
        self.fc = nn.Linear(config.head or channels, config.classes)
        initialise(self)

    def features(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps at the four strides, finest first; see `Backbone`."""
        x = self.maxpool(self.conv1(x))
        found = [x]
        for stage in (self.stage2, self.stage3, self.stage4):
            x = stage(x)
            found.append(x)
        return tuple(found)

    def head(self, last: Tensor) -> Tensor:
        """Logits (b, classes) of the last map."""
        return self.fc(self.conv5(last).mean((2, 3)))
