"""Networks of He et al. 2016 and Simonyan & Zisserman 2015 as their tables have them, for counting alone."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

DEPTHS = {34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
VGG19 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512, 0)
"""Configuration E: channels of 3 x 3 kernels; 0 halves the map."""
STRIDE = ", stride as in the paper"


class Block(nn.Module):
    """A branch beside a shortcut."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Their sum."""
        return self.branch(x) + self.shortcut(x)


def has(name: str) -> bool:
    """Whether the name is one of these."""
    return name in ("plain-34", "vgg-19") or name.endswith(STRIDE)


def build(name: str) -> nn.Module:
    """One of them by its name."""
    if name == "vgg-19":
        return vgg19()
    if name == "plain-34":
        return plain(DEPTHS[34])
    return residual(DEPTHS[int(name.removesuffix(STRIDE).removeprefix("resnet-"))])


def vgg19() -> nn.Module:
    """Sixteen convolutions and three linear layers."""
    layers, width = list[nn.Module](), 3
    for channels in VGG19:
        layers.append(nn.Conv2d(width, channels, 3, padding=1) if channels else nn.MaxPool2d(2))
        width = channels or width
    sizes = (512 * 49, 4096, 4096, 1000)
    return nn.Sequential(*layers, nn.Flatten(), *(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def plain(depths: tuple[int, ...]) -> nn.Module:
    """3 x 3 kernels without shortcuts, two for each block that the residual network has."""
    layers, width = _stem(), 64
    for stage, depth in enumerate(depths):
        for number in range(2 * depth):
            stride, n = (2 if stage and not number else 1), 64 * 2**stage
            layers.append(nn.Conv2d(width, n, 3, stride, 1, bias=False))
            width = n
    return nn.Sequential(*layers, *_head(width))


def residual(depths: tuple[int, ...]) -> nn.Module:
    """Blocks of 1 x 1, 3 x 3, 1 x 1, with the stride in the first of them, as table 1 was counted."""
    layers, width = _stem(), 64
    for stage, depth in enumerate(depths):
        for number in range(depth):
            stride, n = (2 if stage and not number else 1), 64 * 2**stage
            branch = nn.Sequential(
                nn.Conv2d(width, n, 1, stride, bias=False), nn.Conv2d(n, n, 3, 1, 1, bias=False),
                nn.Conv2d(n, 4 * n, 1, bias=False),
            )  # fmt: skip
            shortcut = nn.Identity() if number else nn.Conv2d(width, 4 * n, 1, stride, bias=False)
            layers.append(Block(branch, shortcut))
            width = 4 * n
    return nn.Sequential(*layers, *_head(width))


def _stem() -> list[nn.Module]:
    return [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)]


def _head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000)]
