"""Convolution with TensorFlow's padding="SAME", in which most released EfficientNets were trained.

An axis of n inputs gives ⌈n / s⌉ outputs, and the zeros that this takes,

    P = max(0, (⌈n / s⌉ - 1) s + r (K - 1) + 1 - n),

lie ⌊P / 2⌋ before and the rest behind. With a stride that depends on n: a kernel of 3 and a stride of 2 see an even
axis from its first pixel, where symmetric padding begins one pixel before it. Weights trained one way lose accuracy the
other.

Shapes: input (b, c, y, x), weight (d, c / groups, K, K), bias (d).
"""

from __future__ import annotations

from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.convolution.atrous import Size, check_channels, check_sizes, padded_conv2d, per_axis


@export("functional.conv2d_same")
def conv2d_same(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, dilation: Size = 1, groups: int = 1
) -> Tensor:
    """Convolve an image as TensorFlow does under padding="SAME": ⌈n / stride⌉ outputs on an axis of n.

    input (b, c, y, x); weight (d, c / groups, K, K); bias (d) or None. Raises ValueError when the shapes do not fit.

    >>> import torch
    >>> line = torch.arange(1.0, 5.0).view(1, 1, 1, 4)
    >>> conv2d_same(line, torch.ones(1, 1, 1, 3), stride=2).flatten()  # 1+2+3, 3+4+0
    tensor([6., 7.])
    """
    check_sizes("conv2d_same", 2, {"stride": stride, "dilation": dilation})
    check_channels("conv2d_same", input, weight, groups, 2)
    steps, rate = per_axis(stride, 2), per_axis(dilation, 2)
    axes = zip(input.shape[2:], weight.shape[2:], steps, rate, strict=True)
    zeros = [same_zeros(n, k, s, r) for n, k, s, r in axes]
    return padded_conv2d(input, weight, bias, zeros, steps, rate, groups)


def same_zeros(n: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Zeros before and behind an axis of n.

    >>> same_zeros(224, 3, 2, 1), same_zeros(95, 3, 2, 1), same_zeros(7, 1, 2, 1)
    ((0, 1), (1, 1), (0, 0))
    """
    total = max(0, (-(-n // stride) - 1) * stride + dilation * (kernel - 1) + 1 - n)
    return total // 2, total - total // 2


@export("nn.Conv2dSame", twin=conv2d_same)
class Conv2dSame(nn.Conv2d):
    """`torch.nn.Conv2d` with TensorFlow's padding="SAME" in place of its own.

    >>> import torch
    >>> Conv2dSame(3, 8, 3, stride=2)(torch.zeros(1, 3, 7, 4)).shape
    torch.Size([1, 8, 4, 2])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, dilation=dilation, groups=groups, bias=bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # nn.Conv2d.forward calls this, and so do low-rank updates with weights of their own.
        return conv2d_same(input, weight, bias, self.stride, self.dilation, self.groups)
