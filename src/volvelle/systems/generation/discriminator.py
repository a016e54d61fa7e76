"""The patch discriminator: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks".

Section 3.2.2. A small convolutional network whose every output judges a patch of the picture, so that what it teaches
is texture. The names are those of taming-transformers' NLayerDiscriminator.
"""

from __future__ import annotations

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Scores (b, 1, h, w) of the patches of pictures (b, channels, y, x), before any sigmoid.

    The first convolution and `layers` - 1 more have stride 2, then come two of stride 1; channels double from `width`
    up to 8 times. Three layers judge patches of 70 x 70 pixels, two of 34 x 34, one of 16 x 16.

    >>> import torch
    >>> PatchDiscriminator(1, width=8, layers=2)(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 1, 5, 5])
    """

    def __init__(self, channels: int = 3, *, width: int = 64, layers: int = 3):
        super().__init__()
        if min(channels, width, layers) < 1:
            raise ValueError(
                f"PatchDiscriminator: channels, width and layers must be at least 1, got {channels}, {width}, {layers}"
            )
        parts: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        before = width
        for number in range(1, layers + 1):
            after = width * min(2**number, 8)
            stride = 2 if number < layers else 1
            parts += [
                nn.Conv2d(before, after, 4, stride, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.2),
            ]
            before = after
        self.main = nn.Sequential(*parts, nn.Conv2d(before, 1, 4, 1, 1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """Score every patch."""
        return self.main(pixels)
