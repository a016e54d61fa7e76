"""Networks of inverted residuals, MobileNetV2 and the EfficientNets: one class, timm's layer names."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from volvelle.parts.convolution.inverted_residual import InvertedResidual, convolution
from volvelle.parts.convolution.squeeze_excite import MODULES
from volvelle.systems.backbone.config import MobileConfig, OutputStride
from volvelle.systems.backbone.model import Backbone, Strides, initialise


class MobileNet(Backbone):
    """Stem, stages of inverted residuals, a wide 1 x 1 head, and a classifier of the mean (a `MobileConfig`)."""

    def __init__(self, config: MobileConfig, *, output_stride: OutputStride = 32):
        ends = _ends(config)
        super().__init__(config, [config.stages[end].channels for end in ends], output_stride)
        self.ends, self.padding = ends, config.padding
        eps, momentum = config.norm.eps, config.norm.momentum
        self.conv_stem = convolution(3, config.stem, 3, 2, padding=config.padding)
        self.bn1 = nn.BatchNorm2d(config.stem, eps, momentum)
        self.blocks = _stages(config, Strides(output_stride, 2))
        self.conv_head = convolution(config.stages[-1].channels, config.head, padding=config.padding)
        self.bn2 = nn.BatchNorm2d(config.head, eps, momentum)
        self.act = MODULES[config.activation]()
        self.classifier = nn.Linear(config.head, config.classes)
        initialise(self)

    def features(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps at the four strides, finest first; see `Backbone`."""
        x = self.act(self.bn1(self.conv_stem(x)))
        found = []
        for number, stage in enumerate(self.blocks):
            x = stage(x)
            if number in self.ends:
                found.append(x)
        return tuple(found)

    def head(self, last: Tensor) -> Tensor:
        """Logits (b, classes) of the last map."""
        pooled = self.act(self.bn2(self.conv_head(last))).mean((2, 3))
        return self.classifier(F.dropout(pooled, self.config.dropout, self.training))


def _ends(config: MobileConfig) -> list[int]:
    """The last stage at each of the strides 4, 8, 16 and 32."""
    strided = [number for number, stage in enumerate(config.stages) if stage.stride > 1]
    return [*(number - 1 for number in strided[1:]), len(config.stages) - 1]


def _stages(config: MobileConfig, strides: Strides) -> nn.Sequential:
    channels, built = config.stem, 0
    total = sum(stage.repeats for stage in config.stages)
    stages = nn.Sequential()
    for stage in config.stages:
        blocks = nn.Sequential()
        for number in range(stage.repeats):
            stride, dilation = strides.step(1 if number else stage.stride)
            block = InvertedResidual(
                channels,
                stage.channels,
                stage.kernel,
                stride,
                expansion=stage.expansion,
                squeezed=int(channels * stage.squeeze),
                activation=config.activation,
                dilation=dilation,
                padding=config.padding,
                eps=config.norm.eps,
                momentum=config.norm.momentum,
                drop=config.drop_path * built / total,
            )
            blocks.append(block)
            channels, built = stage.channels, built + 1
        stages.append(blocks)
    return stages
