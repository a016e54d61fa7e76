"""Global (large-kernel, separable) convolution: Peng et al. 2017, "Large Kernel Matters: Improve Semantic Segmentation
by Global Convolutional Network", section 3.1 and figure 2B.

    y = x * w_(k x 1) * w_(1 x k)  +  x * w_(1 x k) * w_(k x 1)

The two branches have weights of their own and no nonlinearity between them, so the sum is one dense k x k convolution
whose kernels have low rank. It connects every output with k x k inputs for 2 / k of a dense kernel's cost, roughly.

Shapes: x (b, c, y, x), y (b, d, y, x).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.convolution.atrous import AtrousConv2d

Convolution: TypeAlias = Callable[[Tensor], Tensor]


@export("functional.global_convolution")
def global_convolution(
    x: Tensor, left: tuple[Convolution, Convolution], right: tuple[Convolution, Convolution]
) -> Tensor:
    """Add two chains of thin convolutions: left[1](left[0](x)) + right[1](right[0](x)).

    x (b, c, y, x); `left` is (k x 1, 1 x k), `right` (1 x k, k x 1), Modules or functions that keep the size; the
    result is (b, d, y, x). Peng et al. 2017, section 3.1.

    >>> global_convolution(torch.tensor(1.0), (lambda x: x + 1, lambda x: 2 * x), (lambda x: 2 * x, lambda x: x + 1))
    tensor(7.)
    """
    return left[1](left[0](x)) + right[1](right[0](x))


@export("nn.GlobalConvolution", twin=global_convolution, stable=True)
class GlobalConvolution(nn.Module):
    """`global_convolution` with its four convolutions; the size of the image stays, for any k.

    `conv_l1` (k x 1) and `conv_l2` (1 x k) are the left branch, `conv_r1` (1 x k) and `conv_r2` (k x 1) the right.
    Parameters: 2 k d (c + d), and 4 d with biases; multiplications: 2 k d (c + d) for each pixel, where a dense k x k
    kernel takes k² c d.

    >>> layer = GlobalConvolution(8, 3, kernel_size=7)
    >>> layer(torch.zeros(2, 8, 5, 6)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([2, 3, 5, 6]), 474)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        k = kernel_size

        def conv(channels: int, height: int, width: int) -> AtrousConv2d:
            return AtrousConv2d(channels, out_channels, (height, width), bias=bias, device=device, dtype=dtype)

        self.conv_l1, self.conv_l2 = conv(in_channels, k, 1), conv(out_channels, 1, k)
        self.conv_r1, self.conv_r2 = conv(in_channels, 1, k), conv(out_channels, k, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, c, y, x) to (b, d, y, x)."""
        return global_convolution(x, (self.conv_l1, self.conv_l2), (self.conv_r1, self.conv_r2))
