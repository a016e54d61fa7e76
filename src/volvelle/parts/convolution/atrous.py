"""Atrous (dilated) convolution: Chen et al. 2018, "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets,
Atrous Convolution, and Fully Connected CRFs", section 3.1; Yu & Koltun 2016, "Multi-Scale Context Aggregation by
Dilated Convolutions", section 2.

    y[i] = Σ_k x[s i + r k - p] w[k],     k = 0 .. K - 1

with rate (dilation) r, stride s and zeros outside. The K taps span r (K - 1) + 1 inputs for K weights. Here the padding
follows from the rate, p = ⌊r (K - 1) / 2⌋ before and the rest behind, so that an axis of n inputs gives ⌈n / s⌉ outputs
for every K, r and s; torch's own padding="same" refuses strides.

Shapes: input (b, c, y, x) or (b, c, n), weight (d, c / groups, K, K) or (d, c / groups, K), bias (d).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.export import export

Size = int | Sequence[int]
"""One number for every axis, or one for each."""


def per_axis(value: Size, axes: int) -> tuple[int, ...]:
    """One number for each axis.

    >>> per_axis(3, 2), per_axis((1, 2), 2)
    ((3, 3), (1, 2))
    """
    return (value,) * axes if isinstance(value, int) else tuple(value)


def same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Zeros before and behind, for each axis, with which stride 1 keeps the size.

    >>> same_padding((3, 2), (2, 3))
    [(2, 2), (1, 2)]
    """
    spans = [r * (k - 1) for k, r in zip(kernel, dilation, strict=True)]
    return [(span // 2, span - span // 2) for span in spans]


def check_sizes(call: str, axes: int, sizes: dict[str, Size]) -> None:
    """Raise ValueError unless each is at least 1, given once or for each of the axes."""
    for name, value in sizes.items():
        if len(per_axis(value, axes)) != axes or min(per_axis(value, axes)) < 1:
            raise ValueError(f"{call}: {name} must be at least 1, once or for each of {axes} axes, got {value}")


def check_channels(call: str, input: Tensor, weight: Tensor, groups: int, axes: int) -> None:
    """Raise ValueError unless input (b, c, ..) and weight (d, c / groups, ..) fit and have these axes."""
    if input.dim() != axes + 2 or weight.dim() != axes + 2:
        raise ValueError(
            f"{call}: input and weight must have {axes + 2} axes, got {tuple(input.shape)} and {tuple(weight.shape)}"
        )
    if groups < 1 or input.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ValueError(
            f"{call}: weight must be (d, c / groups, ..) with d a multiple of groups, got input {tuple(input.shape)}, "
            f"weight {tuple(weight.shape)} and groups {groups}"
        )


def padded_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    zeros: Sequence[tuple[int, int]],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolve as torch does, with zeros before and behind each axis that may differ: then they are copied in."""
    (top, bottom), (left, right) = zeros
    if (top, left) == (bottom, right):
        return F.conv2d(input, weight, bias, stride, (top, left), dilation, groups)
    return F.conv2d(F.pad(input, (left, right, top, bottom)), weight, bias, stride, 0, dilation, groups)


@export("functional.atrous_conv2d")
def atrous_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve an image with spread-out taps: y[i] = Σ_k x[s i + r k - p] w[k] + bias, on both axes.

    input (b, c, y, x); weight (d, c / groups, K, K), any K; bias (d) or None; the result is (b, d, ⌈y / s⌉, ⌈x / s⌉).
    Multiplications: d K² c / groups for each output, whatever the rate. Raises ValueError when the shapes do not fit.
    Chen et al. 2018, section 3.1.

    >>> line = torch.arange(1.0, 8.0).view(1, 1, 1, 7)
    >>> atrous_conv2d(line, torch.ones(1, 1, 1, 3), dilation=2).flatten()
    tensor([ 4.,  6.,  9., 12., 15., 10., 12.])
    """
    check_sizes("atrous_conv2d", 2, {"stride": stride, "dilation": dilation})
    check_channels("atrous_conv2d", input, weight, groups, 2)
    steps, rate = per_axis(stride, 2), per_axis(dilation, 2)
    return padded_conv2d(input, weight, bias, same_padding(weight.shape[2:], rate), steps, rate, groups)


@export("functional.atrous_conv1d")
def atrous_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve a sequence with spread-out taps: y[i] = Σ_k x[s i + r k - p] w[k] + bias.

    input (b, c, n); weight (d, c / groups, K), any K; bias (d) or None; the result is (b, d, ⌈n / s⌉). Raises
    ValueError when the shapes do not fit. Chen et al. 2018, equation 1; `causal_conv1d` looks back only.

    >>> atrous_conv1d(torch.arange(1.0, 6.0).view(1, 1, 5), torch.ones(1, 1, 2), dilation=2).flatten()
    tensor([2., 4., 6., 8., 4.])
    """
    check_sizes("atrous_conv1d", 1, {"stride": stride, "dilation": dilation})
    check_channels("atrous_conv1d", input, weight, groups, 1)
    before, behind = same_padding(weight.shape[2:], (dilation,))[0]
    if before == behind:
        return F.conv1d(input, weight, bias, stride, before, dilation, groups)
    return F.conv1d(F.pad(input, (before, behind)), weight, bias, stride, 0, dilation, groups)


@export("nn.AtrousConv2d", twin=atrous_conv2d)
class AtrousConv2d(nn.Conv2d):
    """`atrous_conv2d` with its weight: an nn.Conv2d whose padding follows from kernel size and dilation.

    Parameters: d K² c / groups, and d with a bias; the rate changes none of them. The names of its weights, and what
    acts on an nn.Conv2d (low-rank updates, counters), are torch's.

    >>> AtrousConv2d(3, 8, 3, dilation=4)(torch.zeros(2, 3, 7, 9)).shape
    torch.Size([2, 8, 7, 9])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        *,
        stride: Size = 1,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_sizes("AtrousConv2d", 2, {"kernel_size": kernel_size, "stride": stride, "dilation": dilation})
        kernel, steps, rate = (tuple(per_axis(value, 2)) for value in (kernel_size, stride, dilation))
        # Where padding is uneven this attribute says what is before; _conv_forward is what pads.
        padding = tuple(before for before, _ in same_padding(kernel, rate))
        super().__init__(
            in_channels,
            out_channels,
            kernel,  # pyright: ignore[reportArgumentType]
            stride=steps,  # pyright: ignore[reportArgumentType]
            padding=padding,  # pyright: ignore[reportArgumentType]
            dilation=rate,  # pyright: ignore[reportArgumentType]
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # nn.Conv2d.forward calls this, and so do low-rank updates with weights of their own.
        return atrous_conv2d(input, weight, bias, self.stride, self.dilation, self.groups)


@export("nn.AtrousConv1d", twin=atrous_conv1d)
class AtrousConv1d(nn.Conv1d):
    """`atrous_conv1d` with its weight: an nn.Conv1d whose padding follows from kernel size and dilation.

    >>> AtrousConv1d(3, 8, 3, dilation=4, stride=2)(torch.zeros(2, 3, 7)).shape
    torch.Size([2, 8, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_sizes("AtrousConv1d", 1, {"kernel_size": kernel_size, "stride": stride, "dilation": dilation})
        before, _ = same_padding((kernel_size,), (dilation,))[0]
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=before,
            dilation=dilation,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return atrous_conv1d(input, weight, bias, self.stride[0], self.dilation[0], self.groups)
