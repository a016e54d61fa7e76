"""A segmenter: an encoder's maps, a decoder that makes scores of them, and scores as large as the picture."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from volvelle.data.images_prepare import Preprocessing
from volvelle.systems.backbone.load import build
from volvelle.systems.backbone.model import Backbone
from volvelle.systems.backbone.names import find_config
from volvelle.systems.backbone.trim import without_classifier
from volvelle.systems.segmentation.atrous import ASPPDecoder, ContextDecoder
from volvelle.systems.segmentation.config import ASPP, FCN, GCN, Context, Head, SegmenterConfig
from volvelle.systems.segmentation.fcn import FCNDecoder
from volvelle.systems.segmentation.gcn_decoder import GCNDecoder
from volvelle.systems.segmentation.unet import UNetDecoder


class Segmenter(nn.Module):
    """Logits (b, classes, y, x) of pictures x (b, 3, y, x), which `preprocessing.normalise` makes of bytes.

    Any height and width will do. `encoder` is a `Backbone` without its classifier, or a fresh one of the configuration;
    `decoder(features, x)` gives scores at its own stride.

    >>> import torch
    >>> config = SegmenterConfig("efficientnet-lite0", GCN(kernel=3), ("sky", "road"))
    >>> Segmenter(config).eval()(torch.zeros(1, 3, 50, 70)).shape
    torch.Size([1, 2, 50, 70])
    """

    def __init__(self, config: SegmenterConfig, encoder: Backbone | None = None, decoder: nn.Module | None = None):
        super().__init__()
        self.config = config
        encoder = encoder or build(find_config(config.backbone), config.output_stride)
        self.preprocessing: Preprocessing = encoder.preprocessing
        self.encoder = without_classifier(encoder)
        self.decoder = decoder or build_decoder(config.head, encoder.channels, len(config.classes))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.config.classes

    def scores(self, x: Tensor) -> Tensor:
        """Logits at the decoder's own stride."""
        return self.decoder(self.encoder.features(x), x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits in the size of the picture."""
        return F.interpolate(self.scores(x), size=x.shape[-2:], mode="bilinear", align_corners=False)


def build_decoder(head: Head, channels: Sequence[int], classes: int) -> nn.Module:
    """The decoder of a configuration, for maps of these channels, finest first; with fresh weights."""
    if isinstance(head, GCN):
        return GCNDecoder(head, channels, classes)
    if isinstance(head, ASPP):
        return ASPPDecoder(head, channels, classes)
    if isinstance(head, Context):
        return ContextDecoder(head, channels, classes)
    if isinstance(head, FCN):
        return FCNDecoder(head, channels, classes)
    return UNetDecoder(head, channels, classes)
