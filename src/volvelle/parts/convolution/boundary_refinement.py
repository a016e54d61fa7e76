"""Boundary refinement: Peng et al. 2017, "Large Kernel Matters: Improve Semantic Segmentation by Global Convolutional
Network", section 3.2 and figure 2C.

    S̃ = S + R(S),     R = convolution ∘ ReLU ∘ convolution, both 3 x 3

A residual branch on score maps, which corrects them near boundaries. Shapes: S and S̃ (b, c, y, x).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.convolution.atrous import AtrousConv2d


@export("functional.boundary_refinement")
def boundary_refinement(
    scores: Tensor, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]
) -> Tensor:
    """Correct score maps by a residual branch: S + second(ReLU(first(S))).

    scores (b, c, y, x); `first` and `second` are convolutions that keep this shape, Modules or functions. Peng et al.
    2017, section 3.2.

    >>> boundary_refinement(torch.tensor([-1.0, 2.0]), lambda s: s, lambda r: 10 * r)
    tensor([-1., 22.])
    """
    return scores + second(first(scores).relu())


@export("nn.BoundaryRefinement", twin=boundary_refinement, stable=True)
class BoundaryRefinement(nn.Module):
    """`boundary_refinement` with its two convolutions `conv1` and `conv2` of `channels` to `channels`.

    Parameters: 2 (K² c² + c); multiplications: 2 K² c² for each pixel. K = `kernel_size` is 3 in the paper. With
    conv2 at zero it is the identity.

    >>> refine = BoundaryRefinement(5)
    >>> refine(torch.zeros(2, 5, 7, 9)).shape, sum(p.numel() for p in refine.parameters())
    (torch.Size([2, 5, 7, 9]), 460)
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.conv1 = AtrousConv2d(channels, channels, kernel_size, device=device, dtype=dtype)
        self.conv2 = AtrousConv2d(channels, channels, kernel_size, device=device, dtype=dtype)

    def forward(self, scores: Tensor) -> Tensor:
        """Map (b, c, y, x) to the same shape."""
        return boundary_refinement(scores, self.conv1, self.conv2)
