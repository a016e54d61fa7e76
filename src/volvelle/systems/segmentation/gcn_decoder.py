"""Global convolutional network: Peng et al. 2017, "Large Kernel Matters: Improve Semantic Segmentation by Global
Convolutional Network", figure 2.

    S_32 = BR(GCN_k(F_32)),     S_i = BR(up(S_2i) + BR(GCN_k(F_i)))     for i = 16, 8, 4

Every map of the encoder becomes scores through a large, separable kernel, which sees most of the picture from the
coarse maps; scores are then added up from coarse to fine. Scores go up bilinearly here where the paper learns
deconvolutions, which begin as just that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from volvelle.parts.convolution.atrous import AtrousConv2d
from volvelle.parts.convolution.boundary_refinement import BoundaryRefinement
from volvelle.parts.convolution.global_convolution import GlobalConvolution
from volvelle.systems.blocks import conv_norm, like
from volvelle.systems.segmentation.config import GCN

Context = Callable[[int, int], nn.Module]
"""Builds what turns a map of so many channels into scores of so many."""


class GCNDecoder(nn.Module):
    """Scores (b, classes, ⌈y / s⌉, ⌈x / s⌉) of an encoder's maps, s the finest map's stride, or 2 with `detail`.

    `channels` are the maps' channels, finest first. `context` replaces the global convolutions, for comparisons.
    """

    def __init__(self, config: GCN, channels: Sequence[int], classes: int, *, context: Context | None = None):
        super().__init__()
        width = config.width or classes
        build = context or (lambda c, d: GlobalConvolution(c, d, config.kernel))

        def refine(channels: int) -> nn.Module:
            return BoundaryRefinement(channels) if config.refine else nn.Identity()

        self.context = nn.ModuleList([build(c, width) for c in channels])
        self.refine = nn.ModuleList([refine(width) for _ in channels])
        self.merge = nn.ModuleList([refine(width) for _ in channels[1:]])
        self.detail: nn.Module | None = None
        if config.detail:
            self.detail = nn.Sequential(conv_norm(3, config.detail, stride=2), conv_norm(config.detail, config.detail))
            self.narrow = AtrousConv2d(width, config.detail, 1)
            self.sharpen = refine(config.detail)
        last = config.detail or width
        paper = config.width is None and not config.detail
        self.classify: nn.Module = nn.Identity() if paper else AtrousConv2d(last, classes, 1)

    def forward(self, features: Sequence[Tensor], x: Tensor) -> Tensor:
        """Combine maps, finest first, of the picture x (b, 3, y, x)."""
        scores = None
        for i in reversed(range(len(features))):
            found = self.refine[i](self.context[i](features[i]))
            scores = found if scores is None else self.merge[i](like(scores, found) + found)
        assert scores is not None
        if self.detail is not None:
            fine = self.detail(x)
            scores = self.sharpen(like(self.narrow(scores), fine) + fine)
        return self.classify(scores)
