"""Prefix tuning: trained keys and values before the text, in every layer.

Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation". The activations of l positions before
the text are free parameters. Trained directly they are unstable, so they come out of a smaller table through a
feed-forward network (section 4.3), P[i, :] = MLP(P'[i, :]); after training only P is kept.

Shapes: l prefix positions, k features of the table P', h_kv key/value heads, d features a head; P has 2 · layers · h_kv
· d features a position, in the order (layer, key or value, head, feature), which is also that of PEFT's files.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.export import export

MLP = tuple[Tensor, Tensor, Tensor, Tensor]


@export("functional.prefix_states")
def prefix_states(
    table: Tensor, layers: int, kv_heads: int, *, mlp: MLP | None = None, start: Tensor | None = None
) -> Tensor:
    """Lay out a prefix as keys and values for every layer: (layers, 2, 1, h_kv, l, d).

    P = table, or P = W₂ tanh(W₁ table + b₁) + b₂ with `mlp` = (W₁, b₁, W₂, b₂), W₁ (hidden, k) and W₂ (2 · layers ·
    h_kv · d, hidden). `start` (l, 2 · layers · h_kv · d) is added to it: the activations of real words to begin from
    (section 7.4). Raises ValueError when the features do not divide among layers and heads.
    Li & Liang 2021, sections 4.2 and 4.3.

    >>> prefix_states(torch.arange(16.0).view(2, 8), layers=2, kv_heads=1)[:, :, 0, 0, 0]
    tensor([[[0., 1.],
             [2., 3.]],
    <BLANKLINE>
            [[4., 5.],
             [6., 7.]]])
    """
    if mlp is not None:
        first, first_bias, second, second_bias = mlp
        table = F.linear(torch.tanh(F.linear(table, first, first_bias)), second, second_bias)
    if start is not None:
        table = table + start
    if table.dim() != 2 or table.shape[1] % (2 * layers * kv_heads):
        raise ValueError(
            f"prefix_states: a prefix must be (l, 2 * {layers} layers * {kv_heads} heads * d), got {tuple(table.shape)}"
        )
    return table.view(len(table), layers, 2, kv_heads, -1).permute(1, 2, 3, 0, 4)[:, :, None]


@export("nn.PrefixStates", twin=prefix_states)
class PrefixStates(nn.Module):
    """`prefix_states` with its trained parameters: the table, and the network that makes P of it.

    `hidden` is the width of the network's middle layer; None trains P itself. `width` is k, by default h_kv · d (as
    PEFT has it; the paper takes the model's width). Everything is drawn as nn.Embedding and nn.Linear draw it, from
    `generator`. With `start` the network begins at zero, so that training begins exactly at these activations.
    `fold` puts P in the place of table and network.

    >>> prefix = PrefixStates(10, layers=2, kv_heads=3, head_width=4, hidden=32)
    >>> prefix().shape, prefix.stored
    (torch.Size([2, 2, 1, 3, 10, 4]), 480)
    >>> states = prefix()
    >>> bool((prefix.fold()() == states).all()), sum(p.numel() for p in prefix.parameters())
    (True, 480)
    """

    def __init__(
        self,
        length: int,
        layers: int,
        kv_heads: int,
        head_width: int,
        *,
        hidden: int | None = None,
        width: int | None = None,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if min(length, layers, kv_heads, head_width) < 1 or (hidden is not None and hidden < 1):
            raise ValueError(
                f"PrefixStates: length, layers, kv_heads, head_width and hidden must be at least 1, got "
                f"{(length, layers, kv_heads, head_width, hidden)}"
            )
        self.length, self.layers, self.kv_heads, self.head_width = length, layers, kv_heads, head_width
        out = 2 * layers * kv_heads * head_width
        if start is not None and tuple(start.shape) != (length, out):
            raise ValueError(f"PrefixStates: start must be {(length, out)}, got {tuple(start.shape)}")
        self.table = nn.Parameter(torch.empty(length, out if hidden is None else width or kv_heads * head_width))
        self.first: nn.Linear | None = None
        self.second: nn.Linear | None = None
        self.start: Tensor | None
        self.register_buffer("start", start)
        if hidden is not None:
            self.first = nn.Linear(self.table.shape[1], hidden)
            self.second = nn.Linear(hidden, out)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh parameters, as the class says."""
        nn.init.normal_(self.table, generator=generator)
        for layer in (self.first, self.second):
            if layer is not None:
                bound = layer.in_features**-0.5
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
        if self.start is not None:
            # The last factor alone: gradients reach the others as soon as it has moved.
            for parameter in (self.table,) if self.second is None else self.second.parameters():
                nn.init.zeros_(parameter)

    @property
    def stored(self) -> int:
        """The numbers that are left after training: l · layers · 2 · h_kv · d."""
        return self.length * 2 * self.layers * self.kv_heads * self.head_width

    def forward(self) -> Tensor:
        """Return keys and values (layers, 2, 1, h_kv, l, d)."""
        mlp = None
        if self.first is not None and self.second is not None:
            mlp = (self.first.weight, self.first.bias, self.second.weight, self.second.bias)
        return prefix_states(self.table, self.layers, self.kv_heads, mlp=mlp, start=self.start)

    @torch.no_grad()
    def flat(self) -> Tensor:
        """P, as it is stored: (l, 2 · layers · h_kv · d)."""
        return self()[:, :, 0].permute(3, 0, 1, 2, 4).reshape(self.length, -1)

    def fold(self) -> PrefixStates:
        """Drop the network: from now on P itself is the table. Returns this module."""
        self.table = nn.Parameter(self.flat(), requires_grad=self.table.requires_grad)
        self.first = self.second = self.start = None
        return self

    def extra_repr(self) -> str:
        """Show the sizes."""
        hidden = None if self.first is None else self.first.out_features
        return (
            f"length={self.length}, layers={self.layers}, kv_heads={self.kv_heads}, head_width={self.head_width}, "
            f"hidden={hidden}"
        )
