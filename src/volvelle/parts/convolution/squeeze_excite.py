"""Squeeze and excitation: Hu et al. 2018, "Squeeze-and-Excitation Networks", section 3.

Each channel is scaled by a gate that has seen the whole image:

    z_c = mean over (y, x) of x_c        (squeeze)
    s = σ(W₂ f(W₁ z + b₁) + b₂)          (excitation)
    out_c = s_c · x_c

Shapes: x (b, c, y, x), W₁ (m, c, 1, 1), b₁ (m), W₂ (c, m, 1, 1), b₂ (c); m is the bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.export import export

Activation = Literal["relu", "relu6", "silu"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu}
MODULES: dict[Activation, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": lambda: nn.ReLU6(inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
}
"""The same as layers that write over their input, which a norm before them does not need any more."""


@export("functional.squeeze_excite")
def squeeze_excite(
    x: Tensor,
    reduce: Tensor,
    reduce_bias: Tensor | None,
    expand: Tensor,
    expand_bias: Tensor | None,
    *,
    activation: Activation = "silu",
) -> Tensor:
    """Scale each channel by a gate computed from the means of all: σ(expand f(reduce z + b₁) + b₂) · x.

    x (b, c, y, x); reduce (m, c, 1, 1); expand (c, m, 1, 1); biases (m) and (c) or None. Raises ValueError when the
    shapes do not fit. Hu et al. 2018, equations 2-4.

    >>> import torch
    >>> x = torch.tensor([[[[1.0, 3.0]], [[5.0, 5.0]]]])
    >>> closed = squeeze_excite(x, torch.ones(1, 2, 1, 1), None, torch.zeros(2, 1, 1, 1), torch.tensor([0.0, -99.0]))
    >>> closed.flatten().round(decimals=4)
    tensor([0.5000, 1.5000, 0.0000, 0.0000])
    """
    c = x.shape[1] if x.ndim == 4 else -1
    m = reduce.shape[0]
    if reduce.shape != (m, c, 1, 1) or expand.shape != (c, m, 1, 1):
        raise ValueError(
            f"squeeze_excite: reduce must be (m, c, 1, 1) and expand (c, m, 1, 1) for x (b, c, y, x), got x "
            f"{tuple(x.shape)}, reduce {tuple(reduce.shape)} and expand {tuple(expand.shape)}"
        )
    z = x.mean((2, 3))  # (b, c): two small matrix products, which start faster than convolutions of one pixel
    inner = ACTIVATIONS[activation](F.linear(z, reduce.flatten(1), reduce_bias))  # (b, m)
    gate = F.linear(inner, expand.flatten(1), expand_bias).sigmoid()  # (b, c)
    return x * gate[:, :, None, None]


@export("nn.SqueezeExcite", twin=squeeze_excite)
class SqueezeExcite(nn.Module):
    """Squeeze and excitation of `channels` through `squeezed` features.

    >>> import torch
    >>> gate = SqueezeExcite(32, 8)
    >>> gate(torch.randn(2, 32, 5, 4)).shape, sum(p.numel() for p in gate.parameters())
    (torch.Size([2, 32, 5, 4]), 552)
    """

    def __init__(self, channels: int, squeezed: int, *, activation: Activation = "silu"):
        super().__init__()
        if min(channels, squeezed) < 1:
            raise ValueError(f"SqueezeExcite: needs channels and squeezed >= 1, got {channels} and {squeezed}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"SqueezeExcite: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.activation: Activation = activation
        self.conv_reduce = nn.Conv2d(channels, squeezed, 1)
        self.conv_expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, channels, y, x) to the same shape."""
        reduce, expand = self.conv_reduce, self.conv_expand
        return squeeze_excite(x, reduce.weight, reduce.bias, expand.weight, expand.bias, activation=self.activation)
