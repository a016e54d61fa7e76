"""Depthwise separable convolution: Sifre 2014, "Rigid-Motion Scattering for Image Classification", section 6.2; Howard
et al. 2017, "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", section 3.1.

    depthwise   y_m = x_m * w_m                 one K x K kernel for each channel
    pointwise   z_n = Σ_m v_nm y_m + b_n        a matrix product at each pixel, a 1 x 1 convolution

A dense kernel takes K² M N weights and multiplications a pixel, the two together K² M + M N: 1/N + 1/K² of it (Howard
et al., section 3.1). Nothing stands between them here; where a norm and an activation should, as in MobileNet, put
these between an `AtrousConv2d(m, m, k, groups=m)` and a `PointwiseConv2d`.

Shapes: x (b, c, y, x), depthwise weight (m c, 1, K, K), pointwise weight (d, m c, 1, 1), bias (d), z (b, d, y', x').
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.convolution.atrous import AtrousConv2d, Size, atrous_conv2d, check_channels


@export("functional.pointwise_conv2d")
def pointwise_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Mix the channels of each pixel by one matrix: z_n = Σ_m v_nm x_m + b_n.

    input (b, c, y, x); weight (d, c, 1, 1); bias (d) or None; the result is (b, d, y, x). Multiplications: c d for each
    pixel. Raises ValueError when the shapes do not fit. Lin et al. 2014, "Network In Network", section 3.1.

    >>> pointwise_conv2d(torch.ones(1, 2, 1, 2), torch.tensor([[1.0, 2.0]])[..., None, None]).flatten()
    tensor([3., 3.])
    """
    check_channels("pointwise_conv2d", input, weight, 1, 2)
    if weight.shape[2:] != (1, 1):
        raise ValueError(f"pointwise_conv2d: weight must be (d, c, 1, 1), got {tuple(weight.shape)}")
    return F.conv2d(input, weight, bias)


@export("functional.depthwise_separable_conv2d")
def depthwise_separable_conv2d(
    input: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    dilation: Size = 1,
) -> Tensor:
    """Convolve each channel with its own kernels, then mix the channels of each pixel.

    input (b, c, y, x); depthwise (m c, 1, K, K) with m kernels a channel; pointwise (d, m c, 1, 1); bias (d) or None;
    the result is (b, d, ⌈y / stride⌉, ⌈x / stride⌉), padded as by `atrous_conv2d`. Raises ValueError when the shapes do
    not fit. Howard et al. 2017, section 3.1.

    >>> x, pointwise = torch.ones(1, 2, 3, 3), torch.tensor([[1.0, 10.0]])[..., None, None]
    >>> depthwise_separable_conv2d(x, torch.ones(2, 1, 3, 3), pointwise)[0, 0]
    tensor([[44., 66., 44.],
            [66., 99., 66.],
            [44., 66., 44.]])
    """
    spatial = atrous_conv2d(input, depthwise, None, stride, dilation, groups=input.shape[1])
    return pointwise_conv2d(spatial, pointwise, bias)


@export("nn.PointwiseConv2d", twin=pointwise_conv2d)
class PointwiseConv2d(nn.Conv2d):
    """`pointwise_conv2d` with its weight: an nn.Conv2d of kernel size 1. Parameters: c d, and d with a bias.

    >>> PointwiseConv2d(3, 8)(torch.zeros(2, 3, 4, 5)).shape
    torch.Size([2, 8, 4, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return pointwise_conv2d(input, weight, bias)


@export("nn.DepthwiseSeparableConv2d", twin=depthwise_separable_conv2d, stable=True)
class DepthwiseSeparableConv2d(nn.Module):
    """`depthwise_separable_conv2d` as two layers, `depthwise` (without a bias) and `pointwise`.

    `multiplier` is the number of kernels for each channel, m. Parameters: m c K² + m c d, and d with a bias; so many
    multiplications, without the biases, for each pixel of the result.

    >>> layer = DepthwiseSeparableConv2d(32, 64, 3, stride=2)
    >>> layer(torch.zeros(2, 32, 7, 9)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([2, 64, 4, 5]), 2400)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        *,
        stride: Size = 1,
        dilation: Size = 1,
        multiplier: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.depthwise = AtrousConv2d(
            in_channels,
            multiplier * in_channels,
            kernel_size,
            stride=stride,
            dilation=dilation,
            groups=in_channels,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.pointwise = PointwiseConv2d(multiplier * in_channels, out_channels, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Map (b, c, y, x) to (b, d, ⌈y / stride⌉, ⌈x / stride⌉)."""
        # The layers are called, not read: what hangs on one of them (an adapter, a hook) acts.
        return self.pointwise(self.depthwise(input))
