"""A light image encoder for Segment Anything: an image classifier's maps, summed at stride 16, behind the same neck.

Coarse maps say what is there, fine ones where it ends: the maps of stride 32 and 8 are brought to stride 16, the first
by interpolation, the second by a strided convolution, and added to that of stride 16 (Lin et al. 2017, "Feature Pyramid
Networks", section 3). What follows is the norm that the mask decoder expects.

With `Light.fine` the embedding, on its way back up, meets the maps of stride 8 and 4, which are narrow and go to the
mask decoder (Ravi et al. 2024, "SAM 2", section 4, takes them as they come; here they know what the embedding knows).

Shapes: b pictures, s pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from volvelle.systems.backbone.load import build
from volvelle.systems.backbone.model import Backbone
from volvelle.systems.backbone.names import find_config
from volvelle.systems.backbone.trim import without_classifier
from volvelle.systems.blocks import like
from volvelle.systems.segmentation.sam.config import Light, SamConfig
from volvelle.systems.segmentation.sam.layers import Features, LayerNorm2d


class LightEncoder(nn.Module):
    """Embedding (b, width, s / 16, s / 16) of normalised pictures (b, 3, s, s), from any backbone.

    `backbone` is one to start from, trained on ImageNet say; a fresh one of the configuration when None.
    """

    def __init__(self, config: SamConfig, backbone: Backbone | None = None):
        super().__init__()
        spec, width = config.encoder, config.width
        assert isinstance(spec, Light)
        self.backbone = without_classifier(backbone or build(find_config(spec.backbone)))
        finest, fine, middle, coarse = self.backbone.channels
        self.fine = nn.Conv2d(fine, width, 3, stride=2, padding=1, bias=False)
        self.middle = nn.Conv2d(middle, width, 1, bias=False)
        self.coarse = nn.Conv2d(coarse, width, 1, bias=False)
        self.neck = nn.Sequential(
            LayerNorm2d(width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width)
        )
        self.gives_fine = spec.fine
        if spec.fine:
            self.eighth = Finer(width, fine, width // 4)
            self.quarter = Finer(width // 4, finest, width // 8)
            self.eighth_out, self.quarter_out = nothing_at_first(width // 4), nothing_at_first(width // 8)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the embedding, in the dtype of the weights."""
        return self._embedded(self.backbone.features(pixels))

    def features(self, pixels: Tensor) -> Features:
        """Return the embedding, and, if so configured, maps of stride 8 and 4 of a quarter and an eighth as wide."""
        maps = self.backbone.features(pixels)
        embedding = self._embedded(maps)
        if not self.gives_fine:
            return Features(embedding)
        eighth = self.eighth(embedding, maps[1])
        quarter = self.quarter(eighth, maps[0])
        return Features(embedding, (self.eighth_out(eighth), self.quarter_out(quarter)), quarter)

    def _embedded(self, maps: Sequence[Tensor]) -> Tensor:
        _, fine, middle, coarse = maps
        found = self.middle(middle)
        return self.neck(found + like(self.coarse(coarse), found) + like(self.fine(fine), found))


def nothing_at_first(channels: int) -> nn.Conv2d:
    """A 1 x 1 convolution that begins at zero.

    What a picture shows is the same for all prompts: a fresh decoder follows what a prompt changes, and this later.
    """
    layer = nn.Conv2d(channels, channels, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
    return layer


class Finer(nn.Module):
    """A coarse map enlarged, a fine one of the backbone added, a norm, GELU and one convolution."""

    def __init__(self, coarse: int, fine: int, channels: int):
        super().__init__()
        self.down = nn.Conv2d(coarse, channels, 1, bias=False)
        self.across = nn.Conv2d(fine, channels, 1, bias=False)
        self.norm = LayerNorm2d(channels)
        self.act = nn.GELU()
        self.out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Return (b, channels, y, x) of coarse (b, ·, ·, ·) and fine (b, ·, y, x)."""
        found = self.across(fine)
        return self.out(self.act(self.norm(found + like(self.down(coarse), found))))
