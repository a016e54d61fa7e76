"""What the parts of Segment Anything share: an encoded picture, a norm over channels, a block of two linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F


class Features(NamedTuple):
    """What an image encoder makes of pictures; g places a side."""

    embedding: Tensor
    """(b, width, g, g)."""
    fine: tuple[Tensor, ...] = ()
    """Maps for the mask decoder, of the shapes `SamConfig.fine` behind b; none from a ViT."""
    cells: Tensor | None = None
    """What the finest of them was made of, (b, width / 8, 4 g, 4 g)."""


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of maps (b, c, y, x), each place for itself.

    >>> import torch
    >>> LayerNorm2d(4)(torch.randn(2, 4, 3, 5)).mean(1).abs().max() < 1e-6
    tensor(True)
    """

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__(channels, eps)

    def forward(self, input: Tensor) -> Tensor:
        """Return maps of the same size, channels last in memory."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TwoLayers(nn.Module):
    """lin2(act(lin1(x))); the names are those of released checkpoints."""

    def __init__(self, width: int, hidden: int, act: Callable[[Tensor], Tensor] = F.gelu):
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., width), as x is."""
        return self.lin2(self.act(self.lin1(x)))
