"""Inception v1 (GoogLeNet): Szegedy et al. 2015, "Going Deeper with Convolutions", table 1.

With batch normalisation after every convolution, as all weights in use have it; torchvision's layer names and poolings.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from volvelle.parts.convolution.inception import InceptionBlock
from volvelle.parts.convolution.inverted_residual import convolution
from volvelle.systems.backbone.config import InceptionConfig, OutputStride
from volvelle.systems.backbone.model import Backbone, Strides, initialise

EPS = 1e-3
# Table 1: 1x1, reduction, 3x3, reduction, 5x5, projection.
THREE = ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64))
FOUR = (
    (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64), (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
)  # fmt: skip
FIVE = ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128))


def _norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, EPS)


def _conv(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    layer = convolution(channels, out, kernel, stride, padding="symmetric")
    return nn.Sequential(OrderedDict(conv=layer, bn=_norm(out), relu=nn.ReLU(inplace=True)))


class _Pool(nn.Module):
    """A pooling whose windows begin at multiples of the stride, the last one perhaps cut; a stride of 1 keeps the size.

    With `centred`, windows of a stride of 1 lie around their pixel, as inside a block.
    """

    def __init__(self, kernel: int, stride: int, dilation: int, *, centred: bool = False):
        super().__init__()
        self.kernel, self.stride, self.dilation = kernel, stride, dilation
        span = dilation * (kernel - 1) if stride == 1 else 0
        before = span // 2 if centred else 0
        self.zeros = (before, span - before) * 2

    def forward(self, input: Tensor) -> Tensor:
        """Map (b, c, y, x) to (b, c, about y / stride, about x / stride)."""
        # Padded by hand: torch's pooling refuses more padding than half a kernel, which dilation needs.
        padded = F.pad(input, self.zeros, value=float("-inf")) if any(self.zeros) else input
        return F.max_pool2d(padded, self.kernel, self.stride, 0, self.dilation, ceil_mode=True)


def _dilate(block: InceptionBlock, rate: int) -> InceptionBlock:
    """Spread the taps of every kernel larger than one pixel."""
    if rate > 1:
        block.branch4[0] = _Pool(3, 1, rate, centred=True)
        for module in block.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
                module.dilation = (rate, rate)
                module.padding = tuple(rate * (side // 2) for side in module.kernel_size)
    return block


class Inception(Backbone):
    """A stem of three convolutions, nine Inception blocks, and a classifier of the mean (an `InceptionConfig`).

    The poolings between the stages cut their windows at the border as torchvision's do, so on sides that are no
    multiple of 32 a map may have one row less than ⌈y / stride⌉.
    """

    classifier_name = "fc"

    def __init__(self, config: InceptionConfig, *, output_stride: OutputStride = 32):
        super().__init__(config, (192, 480, 832, 1024), output_stride)
        strides = Strides(output_stride, 4)
        kernels = (3, config.wide_kernel)

        def block(channels: int, widths: tuple[int, ...]) -> InceptionBlock:
            c1, r3, c3, r5, c5, p = widths
            made = InceptionBlock(channels, c1, r3, c3, r5, c5, p, kernels=kernels, norm=_norm)
            return _dilate(made, strides.dilation)

        self.conv1 = _conv(3, 64, 7, 2)
        self.maxpool1 = _Pool(3, 2, 1)
        self.conv2, self.conv3 = _conv(64, 64, 1), _conv(64, 192, 3)
        self.maxpool2 = _Pool(3, *strides.step(2))
        self.inception3a, self.inception3b = block(192, THREE[0]), block(256, THREE[1])
        self.maxpool3 = _Pool(3, *strides.step(2))
        self.inception4a, self.inception4b, self.inception4c, self.inception4d, self.inception4e = (
            block(channels, widths) for channels, widths in zip((480, 512, 512, 512, 528), FOUR, strict=True)
        )
        self.maxpool4 = _Pool(2, *strides.step(2))
        self.inception5a, self.inception5b = block(832, FIVE[0]), block(832, FIVE[1])
        self.fc = nn.Linear(1024, config.classes)
        initialise(self)

    def features(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps at the four strides, finest first; see `Backbone`."""
        four = self.conv3(self.conv2(self.maxpool1(self.conv1(x))))
        eight = self.inception3b(self.inception3a(self.maxpool2(four)))
        x = self.inception4b(self.inception4a(self.maxpool3(eight)))
        sixteen = self.inception4e(self.inception4d(self.inception4c(x)))
        last = self.inception5b(self.inception5a(self.maxpool4(sixteen)))
        return four, eight, sixteen, last

    def head(self, last: Tensor) -> Tensor:
        """Logits (b, classes) of the last map."""
        return self.fc(F.dropout(last.mean((2, 3)), self.config.dropout, self.training))
