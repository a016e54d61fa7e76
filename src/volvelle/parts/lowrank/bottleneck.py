"""Bottleneck adapters: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1.

A small network with a skip connection, x + scale · up(f(down(x))). The parallel form (He et al. 2022, "Towards a
Unified View of Parameter-Efficient Transfer Learning", section 4.2) adds the same to another residual: the result of
the layer that x also went through. `up` starts at zero, so at step 0 nothing is added.

Shapes: x (..., d), down (m, d), down_bias (m), up (d, m), up_bias (d), result (..., d); m is the bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.export import export

Activation = Literal["relu", "gelu", "silu"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@export("functional.bottleneck_adapter")
def bottleneck_adapter(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    scale: float = 1.0,
    activation: Activation = "relu",
    dropout: float = 0.0,
) -> Tensor:
    """Add a bottleneck's correction: residual + scale · (f(x downᵀ + down_bias) upᵀ + up_bias).

    x (..., d); down (m, d); up (d, m); biases (m) and (d) or None; `residual` (..., d) defaults to x. `dropout` is the
    probability with which each of the m features is dropped. The bottleneck is computed in x's dtype, so its weights
    may stay in fp32 beside a bf16 layer. Raises ValueError when the shapes do not fit. Houlsby et al. 2019, section
    2.1; with another residual, He et al. 2022, table 1.

    >>> x, down, up = torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [3.0]])
    >>> bottleneck_adapter(x, down, None, up, None)
    tensor([[1., 1.]])
    """
    if down.ndim != 2 or up.shape != down.shape[::-1] or down.shape[1] != x.shape[-1]:
        raise ValueError(
            f"bottleneck_adapter: down must be (m, {x.shape[-1]}) and up ({x.shape[-1]}, m) for x of shape "
            f"{tuple(x.shape)}, got down {tuple(down.shape)} and up {tuple(up.shape)}"
        )
    down_bias, up_bias = (None if bias is None else bias.to(x.dtype) for bias in (down_bias, up_bias))
    inner = ACTIVATIONS[activation](F.linear(x, down.to(x.dtype), down_bias))  # (..., m)
    inner = F.dropout(inner, dropout) if dropout else inner
    return torch.add(x if residual is None else residual, F.linear(inner, up.to(x.dtype), up_bias), alpha=scale)


@export("nn.BottleneckAdapter", twin=bottleneck_adapter, stable=True)
class BottleneckAdapter(nn.Module):
    """A bottleneck adapter of `width` features: x + scale · up(f(down(x))), the identity until it is trained.

    `bottleneck` is the inner width. down starts uniform in ±1/√width, up and both biases at zero. Arguments of forward:
    x (..., width), and the residual (default: x) that the correction is added to.

    >>> adapter = BottleneckAdapter(16, 4)
    >>> x = torch.randn(3, 16)
    >>> bool((adapter(x) == x).all()), sum(p.numel() for p in adapter.parameters())
    (True, 148)
    """

    def __init__(
        self,
        width: int,
        bottleneck: int,
        *,
        activation: Activation = "relu",
        scale: float = 1.0,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if min(width, bottleneck) < 1:
            raise ValueError(f"BottleneckAdapter: widths must be at least 1, got {width} and {bottleneck}")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"BottleneckAdapter: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        self.activation: Activation = activation
        self.scale, self.dropout = scale, dropout
        self.down = nn.Parameter(torch.empty(bottleneck, width, dtype=dtype, device=device))
        self.down_bias = nn.Parameter(torch.zeros(bottleneck, dtype=dtype, device=device))
        self.up = nn.Parameter(torch.zeros(width, bottleneck, dtype=dtype, device=device))
        self.up_bias = nn.Parameter(torch.zeros(width, dtype=dtype, device=device))
        nn.init.uniform_(self.down, -1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map x (..., width) to (..., width)."""
        return bottleneck_adapter(
            x,
            self.down,
            self.down_bias,
            self.up,
            self.up_bias,
            residual=residual,
            scale=self.scale,
            activation=self.activation,
            dropout=self.dropout if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        """The numbers shown by print(model)."""
        bottleneck, width = self.down.shape
        return f"width={width}, bottleneck={bottleneck}, activation={self.activation}, scale={self.scale:g}"
