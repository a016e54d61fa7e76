"""Deformable convolution: Dai et al. 2017, "Deformable Convolutional Networks", section 2.1; with a mask Zhu et
al. 2019, "Deformable ConvNets v2: More Deformable, Better Results", equation 1.

    y(p) = Σ_k w_k m_k(p) x(p + p_k + Δp_k(p))

Tap k of the kernel reads at its place p_k plus an offset of its own at every output p, between pixels bilinearly and as
zero outside; m_k scales it (v1: 1). All reads are made at once as rows of a table of pixels and meet the weights in one
matrix product.

Shapes: input (b, c, y, x), weight (d, c / groups, K_y, K_x), offset (b, 2 g K, y', x') in pairs (y, x) for each tap
of each of g groups of channels, mask (b, g K, y', x'), result (b, d, y', x').
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.convolution.atrous import Size, check_sizes, per_axis
from volvelle.parts.regions.boxes import wide
from volvelle.parts.regions.taps import Taps, crossed, pixel_table, weighted_rows, zero_taps


@export("functional.deform_conv2d", stable=True)
def deform_conv2d(  # noqa: PLR0917 - the peer's signature
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Convolve with taps that move: y(p) = Σ_k w_k m_k(p) x(p + p_k + Δp_k(p)) + bias.

    input (b, c, y, x); weight (d, c / groups, K_y, K_x); offset (b, 2 g K_y K_x, y', x') with (Δy, Δx) for each tap,
    row by row, of each of g groups of neighbouring channels; mask (b, g K_y K_x, y', x') or None; the result (b, d,
    y', x') in the input's dtype. Reads are bilinear, zero outside, and made in fp32 at least. A NaN offset gives NaN
    there alone.

    Gradients for all tensors, first and second. Raises ValueError for shapes that do not fit. Dai et al. 2017, section
    2.1; Zhu et al. 2019, equation 1.

    >>> x = torch.arange(9.0).view(1, 1, 3, 3)
    >>> right = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    >>> deform_conv2d(x, right, torch.ones(1, 1, 1, 1))[0, 0]  # every tap one pixel to the right
    tensor([[1., 2., 0.],
            [4., 5., 0.],
            [7., 8., 0.]])
    """
    steps, zeros, rate = per_axis(stride, 2), per_axis(padding, 2), per_axis(dilation, 2)
    groups = _check(input, offset, weight, mask, (steps, zeros, rate))
    (b, c, y, x), (d, _, k_y, k_x) = input.shape, weight.shape
    (out_y, out_x), taps = offset.shape[2:], k_y * k_x
    moves = wide(offset).view(b, groups, taps, 2, out_y, out_x).permute(3, 0, 4, 5, 2, 1)  # (2, b, y', x', K, g)
    tap = torch.arange(taps, device=offset.device)
    starts_y = torch.arange(out_y, device=offset.device) * steps[0] - zeros[0]
    starts_x = torch.arange(out_x, device=offset.device) * steps[1] - zeros[1]
    rows = zero_taps(moves[0] + (starts_y[:, None] + tap // k_x * rate[0])[:, None, :, None], y)
    columns = zero_taps(moves[1] + (starts_x[:, None] + tap % k_x * rate[1])[:, :, None], x)
    first = torch.arange(b * groups, device=input.device).view(b, 1, 1, 1, groups) * (y * x)
    at, share = crossed(first, rows, columns, x, b * groups * y * x)
    if mask is not None:
        share = share * wide(mask).view(b, groups, taps, out_y, out_x).permute(0, 3, 4, 2, 1)[..., None, None]
    table = pixel_table(input.view(b, groups, c // groups, y, x))
    read = weighted_rows(table, Taps(at.flatten(5), share.flatten(5)))  # (b, y', x', K, g, c / g)
    found = _product(read.reshape(-1, taps, c).to(input.dtype), weight, bias)
    return found.view(b, out_y, out_x, d).permute(0, 3, 1, 2)


def _product(reads: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What was read (p, K, c) times weights (d, c / groups, K_y, K_x): (p, d)."""
    (p, taps, c), (d, part) = reads.shape, weight.shape[:2]
    if part == c:
        return nn.functional.linear(reads.flatten(1), weight.flatten(2).transpose(1, 2).reshape(d, taps * c), bias)
    groups = c // part
    left = reads.view(p, taps, groups, part).permute(2, 0, 1, 3).reshape(groups, p, taps * part)
    right = weight.view(groups, d // groups, part, taps).permute(0, 3, 2, 1).reshape(groups, taps * part, d // groups)
    found = torch.bmm(left, right).transpose(0, 1).reshape(p, d)
    return found if bias is None else found + bias.to(found.dtype)


def _check(
    input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, options: tuple[tuple[int, ...], ...]
) -> int:
    """The number of groups whose taps move apart."""
    call = "deform_conv2d"
    steps, zeros, rate = options
    check_sizes(call, 2, {"stride": steps, "dilation": rate})
    shapes = f"got input {tuple(input.shape)}, offset {tuple(offset.shape)} and weight {tuple(weight.shape)}"
    if input.dim() != 4 or offset.dim() != 4 or weight.dim() != 4:
        raise ValueError(f"{call}: input, offset and weight must have 4 axes, {shapes}")
    c, part, kernel = input.shape[1], weight.shape[1], tuple(weight.shape[2:])
    if not part or c % part or weight.shape[0] % (c // part):
        raise ValueError(f"{call}: weight must be (d, c / groups, K, K) with d a multiple of groups, {shapes}")
    spans = zip(input.shape[2:], zeros, rate, kernel, steps, strict=True)
    size = [(n + 2 * p - r * (k - 1) - 1) // s + 1 for n, p, r, k, s in spans]
    per_group = 2 * math.prod(kernel)
    groups, rest = offset.shape[1] // per_group, offset.shape[1] % per_group
    here = [input.shape[0], *size]
    if rest or not groups or c % groups or min(size) < 1 or here != [offset.shape[0], *offset.shape[2:]]:
        wanted = ", ".join(map(str, size))
        raise ValueError(f"{call}: offset must be (b, 2 g K K, {wanted}) with g dividing c, {shapes}")
    if mask is not None and mask.shape != (here[0], offset.shape[1] // 2, *size):
        raise ValueError(f"{call}: mask must be half of the offset, got {tuple(mask.shape)}; {shapes}")
    return groups


@export("nn.DeformConv2d", twin=deform_conv2d, stable=True)
class DeformConv2d(nn.Module):
    """`deform_conv2d` with its weight: called with a map and the offsets, and a mask or none.

    Weights begin as those of nn.Conv2d, and have its names. What predicts the offsets is a layer of its own; one that
    begins at zero (`nn.init.zeros_`) makes this an ordinary convolution at first.

    >>> layer, x = DeformConv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 7, 9)
    >>> layer(x, torch.zeros(2, 18, 7, 9)).shape
    torch.Size([2, 8, 7, 9])
    """

    def __init__(  # noqa: PLR0917 - the peer's signature
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
    ):
        super().__init__()
        check_sizes("DeformConv2d", 2, {"kernel_size": kernel_size, "stride": stride, "dilation": dilation})
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"DeformConv2d: groups must divide {in_channels} and {out_channels}, got {groups}")
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *per_axis(kernel_size, 2)))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and bias as nn.Conv2d does: uniform in ±1 / √(c / groups K²)."""
        bound = self.weight[0].numel() ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (b, d, y', x') for a map (b, c, y, x) and its offsets (b, 2 g K², y', x')."""
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)
