"""Segment Anything, whole: an image encoder, a prompt encoder and a mask decoder, with Meta's names for the weights."""

from __future__ import annotations

from torch import Tensor, nn

from volvelle.data.images_prepare import Preprocessing
from volvelle.systems.segmentation.sam.config import SamConfig, ViT
from volvelle.systems.segmentation.sam.image_encoder import ImageEncoder
from volvelle.systems.segmentation.sam.light_encoder import LightEncoder
from volvelle.systems.segmentation.sam.mask_decoder import MaskDecoder
from volvelle.systems.segmentation.sam.prompt_encoder import PromptEncoder


class Sam(nn.Module):
    """Mask logits and estimated IoU of prompts on pictures; the three parts can be called one by one.

    Coordinates are pixels (x, y) of the input, a square of `config.size`; `Promptable` takes those of any picture.
    `image_encoder` may be given, a `LightEncoder` on trained weights say.

    >>> import torch
    >>> from volvelle.systems.segmentation.sam.config import lite0
    >>> model = Sam(lite0(64)).eval()
    >>> points, labels = torch.tensor([[[[20.0, 30.0]]]]), torch.tensor([[[1]]])
    >>> logits, iou = model(torch.zeros(1, 3, 64, 64), points=points, labels=labels)
    >>> logits.shape, iou.shape
    (torch.Size([1, 1, 3, 16, 16]), torch.Size([1, 1, 3]))
    """

    def __init__(self, config: SamConfig, image_encoder: ImageEncoder | LightEncoder | None = None):
        super().__init__()
        self.config = config
        encoder = ImageEncoder if isinstance(config.encoder, ViT) else LightEncoder
        self.image_encoder = image_encoder or encoder(config)
        self.prompt_encoder = PromptEncoder(config)
        self.mask_decoder = MaskDecoder(config)

    @property
    def preprocessing(self) -> Preprocessing:
        """The side of the input, and the mean and deviation of its pixels."""
        config = self.config
        return Preprocessing(config.size, config.mean, config.std, "bilinear", crop=1.0)

    def forward(
        self,
        pixels: Tensor,
        *,
        points: Tensor | None = None,
        labels: Tensor | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
        multimask: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Return logits (b, k, m, s / 4, s / 4) and IoU (b, k, m) of k prompts on each of b pictures.

        `pixels` (b, 3, s, s) are normalised; prompts are those of `PromptEncoder`.
        """
        seen = self.image_encoder.features(pixels)
        sparse, dense = self.prompt_encoder(points, labels, boxes, masks)
        position = self.prompt_encoder.position()
        return self.mask_decoder(seen.embedding, position, sparse, dense, multimask, fine=seen.fine)
