"""Inverted residual blocks: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", section 3.3;
with squeeze and excitation in the middle, Tan et al. 2019, "MnasNet", figure 7, and Tan & Le 2019, "EfficientNet".

    h = f(norm(W_e x))            1 x 1, c to t c channels (left out where t = 1)
    h = f(norm(W_d * h))          k x k, each channel by itself, stride s
    h = SE(h)                     where asked for
    y = norm(W_p h)               1 x 1, t c to d channels, and no activation: the bottleneck is linear
    out = x + y                   where s = 1 and c = d

The wide tensor is inside and the residual joins the narrow ones. Parameters: t c (c + k² + d), and norms and SE.

Shapes: x (b, c, y, x), result (b, d, ⌈y / s⌉, ⌈x / s⌉).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.convolution.conv2d_same import Conv2dSame
from volvelle.parts.convolution.squeeze_excite import MODULES, Activation, SqueezeExcite

Padding = Literal["symmetric", "same"]


@export("functional.drop_path")
def drop_path(x: Tensor, rate: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Zero whole samples with probability `rate` and scale the others by 1 / (1 - rate) (stochastic depth).

    x (b, …). Huang et al. 2016, "Deep Networks with Stochastic Depth", section 3. Raises ValueError unless
    0 <= rate < 1.

    >>> sorted(drop_path(torch.ones(1000, 1), 0.5).unique().tolist())
    [0.0, 2.0]
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path: rate must lie in [0, 1), got {rate}")
    if rate == 0:
        return x
    kept = x.new_empty((x.shape[0], *(1,) * (x.ndim - 1))).bernoulli_(1 - rate, generator=generator)
    return x * kept.div_(1 - rate)


def convolution(
    channels: int, out: int, kernel: int = 1, stride: int = 1, *, dilation: int = 1, groups: int = 1, padding: Padding
) -> nn.Conv2d:
    """A convolution without bias, for a norm to follow, that gives ⌈n / stride⌉ outputs on an axis of n.

    `padding` "symmetric" pads (k - 1) r / 2 zeros on each side, as PyTorch's networks do; "same" is TensorFlow's.
    """
    if padding == "same" and (stride > 1 or kernel % 2 == 0):  # elsewhere the two are one
        return Conv2dSame(channels, out, kernel, stride, dilation=dilation, groups=groups, bias=False)
    zeros = dilation * (kernel - 1) // 2
    return nn.Conv2d(channels, out, kernel, stride, zeros, dilation=dilation, groups=groups, bias=False)


@export("nn.InvertedResidual")
class InvertedResidual(nn.Module):
    """Expand by `expansion`, filter each channel by itself, project to `out` channels (MobileNetV2, EfficientNet).

    `squeezed`: features of the squeeze-and-excitation bottleneck, 0 for none. `dilation` spreads the depthwise taps.
    `drop` is the probability with which training drops the branch of a sample. Layers have timm's names.

    >>> block = InvertedResidual(16, 24, expansion=6, stride=2)
    >>> block(torch.randn(2, 16, 8, 9)).shape, sum(p.numel() for p in block.parameters())
    (torch.Size([2, 24, 4, 5]), 5136)
    """

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        expansion: int = 6,
        squeezed: int = 0,
        activation: Activation = "relu6",
        dilation: int = 1,
        padding: Padding = "symmetric",
        eps: float = 1e-5,
        momentum: float = 0.1,
        drop: float = 0.0,
    ):
        super().__init__()
        if min(channels, out, kernel, stride, expansion, dilation) < 1 or squeezed < 0 or not 0 <= drop < 1:
            raise ValueError(
                "InvertedResidual: needs channels, out, kernel, stride, expansion, dilation >= 1, squeezed >= 0 and "
                f"0 <= drop < 1, got {(channels, out, kernel, stride, expansion, dilation, squeezed, drop)}"
            )
        wide = channels * expansion
        self.expands, self.joins, self.drop = expansion > 1, stride == 1 and channels == out, drop
        into, outof = (channels, wide) if self.expands else (wide, out)
        self.conv_pw = convolution(into, outof, padding=padding)
        self.conv_dw = convolution(wide, wide, kernel, stride, dilation=dilation, groups=wide, padding=padding)
        self.bn1 = nn.BatchNorm2d(wide, eps, momentum)
        self.bn2 = nn.BatchNorm2d(outof, eps, momentum)
        if self.expands:
            self.conv_pwl = convolution(wide, out, padding=padding)
            self.bn3 = nn.BatchNorm2d(out, eps, momentum)
        self.se = SqueezeExcite(wide, squeezed, activation=activation) if squeezed else nn.Identity()
        self.act = MODULES[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, channels, y, x) to (b, out, ⌈y / stride⌉, ⌈x / stride⌉)."""
        if self.expands:
            h = self.act(self.bn1(self.conv_pw(x)))
            h = self.se(self.act(self.bn2(self.conv_dw(h))))
            y = self.bn3(self.conv_pwl(h))
        else:
            h = self.se(self.act(self.bn1(self.conv_dw(x))))
            y = self.bn2(self.conv_pw(h))
        if not self.joins:
            return y
        return x + (drop_path(y, self.drop) if self.training and self.drop else y)

    def extra_repr(self) -> str:
        """The numbers shown by print(model)."""
        return f"joins={self.joins}, drop={self.drop:g}"
