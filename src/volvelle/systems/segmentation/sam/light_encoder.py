"""A light image encoder for Segment Anything: an image classifier's maps, summed at stride 16, behind the same neck.

Coarse maps say what is there, fine ones where it ends: the maps of stride 32 and 8 are brought to stride 16, the first
by interpolation, the second by a strided convolution, and added to that of stride 16 (Lin et al. 2017, "Feature Pyramid
Networks", section 3). What follows is the norm that the mask decoder expects.

Shapes: b pictures, s pixels a side.
"""

from __future__ import annotations

from torch import Tensor, nn

from volvelle.systems.backbone.load import build
from volvelle.systems.backbone.model import Backbone
from volvelle.systems.backbone.names import find_config
from volvelle.systems.backbone.trim import without_classifier
from volvelle.systems.blocks import like
from volvelle.systems.segmentation.sam.config import Light, SamConfig
from volvelle.systems.segmentation.sam.layers import LayerNorm2d


class LightEncoder(nn.Module):
    """Embedding (b, width, s / 16, s / 16) of normalised pictures (b, 3, s, s), from any backbone.

    `backbone` is one to start from, trained on ImageNet say; a fresh one of the configuration when None.
    """

    def __init__(self, config: SamConfig, backbone: Backbone | None = None):
        super().__init__()
        spec, width = config.encoder, config.width
        assert isinstance(spec, Light)
        self.backbone = without_classifier(backbone or build(find_config(spec.backbone)))
        _, fine, middle, coarse = self.backbone.channels
        self.fine = nn.Conv2d(fine, width, 3, stride=2, padding=1, bias=False)
        self.middle = nn.Conv2d(middle, width, 1, bias=False)
        self.coarse = nn.Conv2d(coarse, width, 1, bias=False)
        self.neck = nn.Sequential(
            LayerNorm2d(width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the embedding, in the dtype of the weights."""
        _, fine, middle, coarse = self.backbone.features(pixels)
        found = self.middle(middle)
        return self.neck(found + like(self.coarse(coarse), found) + like(self.fine(fine), found))
