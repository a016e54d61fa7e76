"""The Modules of this family, small, with an input each; every one maps (b, c, ..) to floating values of its dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from volvelle import nn as parts


class Case(NamedTuple):
    """`build()` makes the Module, `shape` is one that it takes, of batch 2 and odd sizes."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def input(self, dtype: torch.dtype = torch.float32, batch: int | None = None) -> Tensor:
        """A seeded input, of another batch where one is given."""
        shape = self.shape if batch is None else (batch, *self.shape[1:])
        return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

    def module(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The Module with seeded weights."""
        torch.manual_seed(0)
        return self.build().to(dtype)


IMAGE = (2, 3, 5, 7)
CASES = {
    "AtrousConv1d": Case(lambda: parts.AtrousConv1d(3, 4, 2, dilation=3, stride=2), (2, 3, 9)),
    "AtrousConv2d": Case(lambda: parts.AtrousConv2d(3, 4, (3, 2), dilation=(2, 1), stride=(1, 2)), IMAGE),
    "CausalConv1d": Case(lambda: parts.CausalConv1d(3, 4, 2, dilation=2), (2, 3, 7)),
    "PointwiseConv2d": Case(lambda: parts.PointwiseConv2d(3, 4), IMAGE),
    "DepthwiseSeparableConv2d": Case(lambda: parts.DepthwiseSeparableConv2d(3, 4, 3, stride=2, multiplier=2), IMAGE),
    "GlobalConvolution": Case(lambda: parts.GlobalConvolution(3, 2, 4), IMAGE),
    "BoundaryRefinement": Case(lambda: parts.BoundaryRefinement(3), IMAGE),
    "InceptionBlock": Case(lambda: parts.InceptionBlock(3, 2, 2, 2, 2, 2, 2), IMAGE),
    "naive InceptionBlock": Case(lambda: parts.InceptionBlock(3, 2, None, 2, None, 2, None, factor="spread"), IMAGE),
}
