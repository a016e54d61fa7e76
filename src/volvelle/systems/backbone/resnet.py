"""ResNet: He et al. 2016, "Deep Residual Learning for Image Recognition", section 3.3 and table 1.

Blocks of two 3 x 3 convolutions (18 layers), or of 1 x 1, 3 x 3, 1 x 1 (50 and more); the stride is in the 3 x 3 one,
as in the weights that are in use ("v1.5"). Layers have torchvision's and timm's names, which agree.
"""

from __future__ import annotations

from torch import Tensor, nn

from volvelle.parts.convolution.inverted_residual import convolution
from volvelle.systems.backbone.config import OutputStride, ResNetConfig
from volvelle.systems.backbone.model import Backbone, Strides, initialise


def _layer(
    channels: int, out: int, kernel: int, stride: int = 1, dilation: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    layer = convolution(channels, out, kernel, stride, dilation=dilation, padding="symmetric")
    return layer, nn.BatchNorm2d(out)


class Block(nn.Module):
    """y = relu(x' + branch(x)), where x' is x, or a strided 1 x 1 convolution of it where the shapes differ."""

    def __init__(self, channels: int, inner: int, stride: int, dilation: int, *, bottleneck: bool, after: int):
        super().__init__()
        out = 4 * inner if bottleneck else inner
        self.bottleneck = bottleneck
        # The strided convolution keeps its taps where they were; in a basic block the second one sees the denser map.
        first = (channels, inner, 1, 1, 1) if bottleneck else (channels, inner, 3, stride, dilation)
        second = (inner, inner, 3, stride, dilation) if bottleneck else (inner, out, 3, 1, after)
        self.conv1, self.bn1 = _layer(*first)
        self.conv2, self.bn2 = _layer(*second)
        if bottleneck:
            self.conv3, self.bn3 = _layer(inner, out, 1)
        self.act = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(*_layer(channels, out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, channels, y, x) to (b, out, ⌈y / stride⌉, ⌈x / stride⌉)."""
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(self.act(y)))
        return self.act(y.add_(x if self.downsample is None else self.downsample(x)))


class ResNet(Backbone):
    """A 7 x 7 stem, a pooling, four stages of blocks, and a classifier of the mean (a `ResNetConfig`)."""

    classifier_name = "fc"

    def __init__(self, config: ResNetConfig, *, output_stride: OutputStride = 32):
        factor = 4 if config.bottleneck else 1
        super().__init__(config, [64 * 2**stage * factor for stage in range(4)], output_stride)
        self.conv1, self.bn1 = _layer(3, 64, 7, 2)
        self.act = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        strides, channels = Strides(output_stride, 4), 64
        stages: list[nn.Sequential] = []
        for stage, depth in enumerate(config.depths):
            blocks = nn.Sequential()
            for number in range(depth):
                stride, dilation = strides.step(2 if stage and not number else 1)
                inner, after = 64 * 2**stage, strides.dilation
                blocks.append(Block(channels, inner, stride, dilation, bottleneck=config.bottleneck, after=after))
                channels = inner * factor
            stages.append(blocks)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(channels, config.classes)
        initialise(self)

    def features(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps at the four strides, finest first; see `Backbone`."""
        x = self.maxpool(self.act(self.bn1(self.conv1(x))))
        found = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            found.append(x)
        return tuple(found)

    def head(self, last: Tensor) -> Tensor:
        """Logits (b, classes) of the last map."""
        return self.fc(last.mean((2, 3)))
