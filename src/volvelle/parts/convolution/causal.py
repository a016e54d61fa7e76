"""Causal dilated convolution: van den Oord et al. 2016, "WaveNet: A Generative Model for Raw Audio", section 2.1.

    y[i] = Σ_k x[i - r (K - 1 - k)] w[k],     k = 0 .. K - 1

so that no output sees a later input. A stack with rates 1, 2, 4, .., 2^(L-1) and K = 2 sees 2^L inputs. What was read
before the first input is zeros, or the last r (K - 1) inputs of the part before: then a sequence may be read in parts,
down to one input at a time (Paine et al. 2016, "Fast Wavenet Generation Algorithm"), with the same result.

Shapes: input (b, c, n), weight (d, c / groups, K), bias (d), before (b, c, r (K - 1)), result (b, d, n).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.convolution.atrous import check_channels, check_sizes


@export("functional.causal_conv1d")
def causal_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int = 1,
    groups: int = 1,
    *,
    before: Tensor | None = None,
) -> Tensor:
    """Convolve a sequence with taps that look back only: y[i] = Σ_k x[i - r (K - 1 - k)] w[k] + bias.

    input (b, c, n); weight (d, c / groups, K); bias (d) or None; `before` (b, c, r (K - 1)) is what preceded the input,
    zeros by default; the result is (b, d, n). Raises ValueError when the shapes do not fit. van den Oord et al. 2016,
    section 2.1.

    >>> x, weight = torch.arange(1.0, 6.0).view(1, 1, 5), torch.ones(1, 1, 2)
    >>> causal_conv1d(x, weight, dilation=2).flatten()
    tensor([1., 2., 4., 6., 8.])
    >>> causal_conv1d(x[..., 4:], weight, dilation=2, before=x[..., 2:4]).flatten()
    tensor([8.])
    """
    check_sizes("causal_conv1d", 1, {"dilation": dilation})
    check_channels("causal_conv1d", input, weight, groups, 1)
    past = dilation * (weight.shape[-1] - 1)
    if before is None:
        return F.conv1d(F.pad(input, (past, 0)), weight, bias, 1, 0, dilation, groups)
    if before.shape != (*input.shape[:2], past):
        raise ValueError(
            f"causal_conv1d: before must be {(*input.shape[:2], past)}, the last {past} inputs, "
            f"got {tuple(before.shape)}"
        )
    return F.conv1d(torch.cat((before, input), dim=-1), weight, bias, 1, 0, dilation, groups)


@export("nn.CausalConv1d", twin=causal_conv1d)
class CausalConv1d(nn.Conv1d):
    """`causal_conv1d` with its weight; the names of its parameters are nn.Conv1d's.

    >>> stack = nn.Sequential(*(CausalConv1d(1, 1, 2, dilation=2**i) for i in range(4)))  # sees 16 inputs
    >>> stack(torch.zeros(2, 1, 9)).shape
    torch.Size([2, 1, 9])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_sizes("CausalConv1d", 1, {"kernel_size": kernel_size, "dilation": dilation})
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            dilation=dilation,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    @property
    def past(self) -> int:
        """How many inputs before an output it sees, r (K - 1): the length of `before`."""
        return self.dilation[0] * (self.kernel_size[0] - 1)

    def forward(self, input: Tensor, before: Tensor | None = None) -> Tensor:
        """Map (b, c, n) to (b, d, n); `before` (b, c, past) is what preceded, zeros by default."""
        return causal_conv1d(input, self.weight, self.bias, self.dilation[0], self.groups, before=before)
