"""Inception blocks: Szegedy et al. 2015, "Going Deeper with Convolutions", section 4 and figure 2; factorised forms:
Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", section 3 and figures 5 to 7.

    y = [ f_1x1(x),  f_3x3(r_3(x)),  f_5x5(r_5(x)),  f_1x1(pool_3x3(x)) ]      joined along the channels

r_3 and r_5 are 1 x 1 reductions (figure 2b); without them, and with the pooled input as it is, the block is the naive
one (figure 2a), whose width can only grow. Every f and r ends in a ReLU. The wide kernels may be factorised:

    square       K x K as it is
    stacked      (K - 1) / 2 convolutions 3 x 3 in a row, the same field (figure 5)
    asymmetric   1 x K, then K x 1, the same field (figure 6)
    spread       1 x 3 and 3 x 1 side by side, half of the channels each, after 3 x 3 for larger K (figure 7)

Shapes: x (b, c, y, x), result (b, d, y, x).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.convolution.atrous import AtrousConv2d

Factor = Literal["square", "stacked", "asymmetric", "spread"]
Norm = Callable[[int], nn.Module]
"""Makes the norm of so many channels: nn.BatchNorm2d."""


@export("functional.inception_block")
def inception_block(x: Tensor, branches: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
    """Join what several branches make of one input, along the channels.

    x (b, c, y, x); every branch keeps b, y and x. Szegedy et al. 2015, section 4.

    >>> inception_block(torch.ones(1, 1, 1, 1), (lambda x: x, lambda x: 2 * x)).flatten()
    tensor([1., 2.])
    """
    return torch.cat([branch(x) for branch in branches], dim=1)


@export("nn.InceptionBlock", twin=inception_block, stable=True)
class InceptionBlock(nn.Module):
    """Four branches of different fields on one input; the widths are the columns of the paper's table 1.

    `ch3x3red` and `ch5x5red` are the widths of the 1 x 1 reductions, `pool_proj` that of the projection after pooling;
    None leaves one out. `factor` is the form of the two wide kernels, whose sizes `kernels` holds; `norm` makes a norm
    after each convolution, which then has no bias. Names of parameters are torchvision's: `branch2.0.conv.weight`.
    `out_channels` is the width of the result.

    Multiplications for each pixel: c n_1 + c r_3 + 9 r_3 n_3 + c r_5 + 25 r_5 n_5 + c p; naive: c n_1 + 9 c n_3 +
    25 c n_5. As many weights, and a bias for each channel. Raises ValueError for widths below 1, and for kernels or
    widths that a form cannot have.

    >>> block = InceptionBlock(192, 64, 96, 128, 16, 32, 32)  # 3a of GoogLeNet
    >>> block(torch.zeros(2, 192, 5, 7)).shape, sum(p.numel() for p in block.parameters() if p.ndim > 1)
    (torch.Size([2, 256, 5, 7]), 163328)
    >>> naive = InceptionBlock(192, 64, None, 128, None, 32, None)
    >>> naive.out_channels, sum(p.numel() for p in naive.parameters() if p.ndim > 1)
    (416, 387072)
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3red: int | None,
        ch3x3: int,
        ch5x5red: int | None,
        ch5x5: int,
        pool_proj: int | None,
        *,
        factor: Factor = "square",
        kernels: tuple[int, int] = (3, 5),
        norm: Norm | None = None,
    ):
        super().__init__()
        widths = [w for w in (in_channels, ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj) if w is not None]
        if min(widths) < 1:
            raise ValueError(f"InceptionBlock: widths must be at least 1, got {widths}")
        _check(factor, kernels, (ch3x3, ch5x5))

        def wide(reduced: int | None, out: int, kernel: int) -> nn.Sequential:
            inner = reduced or in_channels
            reduction = [_unit(in_channels, inner, (1, 1), norm)] if reduced else []
            return nn.Sequential(*reduction, *_factorised(factor, inner, out, kernel, norm))

        self.branch1 = _unit(in_channels, ch1x1, (1, 1), norm)
        self.branch2 = wide(ch3x3red, ch3x3, kernels[0])
        self.branch3 = wide(ch5x5red, ch5x5, kernels[1])
        projection = [_unit(in_channels, pool_proj, (1, 1), norm)] if pool_proj else []
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), *projection)
        self.out_channels = ch1x1 + ch3x3 + ch5x5 + (pool_proj or in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, c, y, x) to (b, out_channels, y, x)."""
        return inception_block(x, (self.branch1, self.branch2, self.branch3, self.branch4))


def _check(factor: Factor, kernels: tuple[int, int], widths: tuple[int, int]) -> None:
    if factor not in get_args(Factor):
        raise ValueError(f"InceptionBlock: factor must be one of {', '.join(get_args(Factor))}, got {factor!r}")
    least = 3 if factor in {"stacked", "spread"} else 1
    if any(k < least or k % 2 == 0 for k in kernels):
        raise ValueError(f"InceptionBlock: kernels must be odd and at least {least} when {factor}, got {kernels}")
    if factor == "spread" and any(width % 2 for width in widths):
        raise ValueError(f"InceptionBlock: ch3x3 and ch5x5 must be even when spread, got {widths}")


def _unit(c: int, d: int, kernel: tuple[int, int], norm: Norm | None) -> nn.Sequential:
    """A convolution that keeps the size, the norm if any, and a ReLU, under torchvision's names."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=AtrousConv2d(c, d, kernel, bias=norm is None))
    if norm is not None:
        layers["bn"] = norm(d)
    layers["relu"] = nn.ReLU()
    return nn.Sequential(layers)


def _factorised(factor: Factor, c: int, d: int, k: int, norm: Norm | None) -> list[nn.Module]:
    """The layers of one wide kernel from c to d channels."""
    if factor == "square":
        return [_unit(c, d, (k, k), norm)]
    if factor == "asymmetric":
        return [_unit(c, c, (1, k), norm), _unit(c, d, (k, 1), norm)]
    if factor == "stacked":
        return [_unit(c if i == 0 else d, d, (3, 3), norm) for i in range((k - 1) // 2)]
    half = d // 2
    before = [_unit(c if i == 0 else half, half, (3, 3), norm) for i in range((k - 3) // 2)]
    c = half if before else c
    return [*before, _Spread(_unit(c, half, (1, 3), norm), _unit(c, half, (3, 1), norm))]


class _Spread(nn.Module):
    """Two layers side by side, joined along the channels."""

    def __init__(self, wide: nn.Module, high: nn.Module):
        super().__init__()
        self.wide, self.high = wide, high

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, c, y, x) to (b, d, y, x)."""
        return inception_block(x, (self.wide, self.high))
