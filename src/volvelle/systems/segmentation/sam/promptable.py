"""`Promptable(model)`: embed a picture once, then answer points, boxes and masks as they come."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from volvelle.errors import VolvelleError
from volvelle.systems.modes import evaluating
from volvelle.systems.segmentation.sam.embedding import Embedding
from volvelle.systems.segmentation.sam.fingerprint import fingerprint, mark
from volvelle.systems.segmentation.sam.mask_decoder import ImageSide, MaskDecoder
from volvelle.systems.segmentation.sam.model import Sam
from volvelle.systems.segmentation.sam.pictures import as_pixels, padded, scaled
from volvelle.systems.segmentation.sam.prompts import Numbers, Prompts, prepare

if TYPE_CHECKING:
    from PIL.Image import Image

    from volvelle.systems.segmentation.sam.everything import Everything
    from volvelle.systems.segmentation.sam.options import EverythingOptions

THRESHOLD = 0.0
"""The logit from which a pixel belongs to a mask."""
BAND = 1 << 24
"""Pixels of masks that are enlarged together."""


class Masks(NamedTuple):
    """The answer to k prompts, m masks each."""

    masks: Tensor
    """bool (k, m, Y, X), in the size of the picture."""
    iou: Tensor
    """What the model thinks of each, (k, m)."""
    logits: Tensor
    """(k, m, s / 4, s / 4) at low resolution, over the padded input: one a prompt is what a further one takes as
    `masks`."""


class Promptable:
    """Segment Anything with pictures and coordinates as people have them.

    The model's mode and weights stay as they are. `dtype` is what the image encoder computes in: bfloat16 is several
    times as fast where the processor has it, with embeddings that differ by less than 1 %; None: as its weights are.

    >>> from volvelle.systems import sam
    >>> promptable = Promptable(sam("lite0", size=64))
    >>> embedding = promptable.embed(np.zeros((30, 60, 3), dtype=np.uint8))
    >>> found = promptable.predict(embedding, points=[[[20, 10]], [[40, 20]]])
    >>> found.masks.shape, found.iou.shape, found.logits.shape
    (torch.Size([2, 3, 30, 60]), torch.Size([2, 3]), torch.Size([2, 3, 16, 16]))
    """

    def __init__(self, model: Sam, *, dtype: torch.dtype | None = None):
        self.model, self.dtype = model, dtype
        self._weights: tuple[Hashable, str] | None = None
        self._sides = WeakKeyDictionary[Embedding, _Side]()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.prompt_encoder.no_mask_embed.weight.device

    @torch.no_grad()
    def embed(self, image: Image | np.ndarray | Tensor) -> Embedding:
        """Compute a picture's features: once for all prompts.

        `image` is a Pillow image of any mode, or uint8 (y, x), (y, x, 1 to 4), or a tensor (1, 3 or 4, y, x).
        """
        config = self.model.config
        pixels, original = as_pixels(image, config.size)
        x = padded(pixels, config).to(self.device)
        encoder = self.model.image_encoder
        held = next(encoder.parameters()).dtype
        with evaluating(encoder):
            if self.dtype is None or self.dtype == held:
                found = encoder.features(x.to(held))
            else:
                with torch.autocast(self.device.type, self.dtype):
                    found = encoder.features(x)
        kept = self.model.prompt_encoder.no_mask_embed.weight.dtype
        features, *fine = (one.to(kept) for one in (found.embedding, *found.fine))
        shape = scaled(*original, config.size)
        return Embedding(features, original, shape, config.size, config.name, tuple(fine), self.weights())

    @torch.no_grad()
    def predict(
        self,
        embedding: Embedding,
        *,
        points: Numbers | None = None,
        labels: Numbers | None = None,
        boxes: Numbers | None = None,
        masks: Numbers | None = None,
        multimask: bool = True,
        threshold: float = THRESHOLD,
    ) -> Masks:
        """Answer k prompts on one picture.

        `points` (k, n, 2), (x, y) in pixels of the picture, with `labels` (k, n): 1 foreground, 0 background, all 1
        when left out; `boxes` (k, 4); `masks` (k, s / 4, s / 4) or (k, 1, s / 4, s / 4), logits of an earlier answer,
        one a prompt. Of two kinds, both belong to the same k prompts. `multimask` asks for three masks a prompt, for
        prompts that could mean several things; else one. A pixel whose logit is above `threshold` is of the mask.
        Raises VolvelleError for prompts that make no sense, and for an embedding of another model.
        """
        prompts = prepare(embedding, points, labels, boxes, masks)
        logits, iou = self.decode(embedding, prompts, multimask=multimask)
        return Masks(enlarged(logits, embedding, threshold=threshold), iou, logits)

    @torch.no_grad()
    def decode(self, embedding: Embedding, prompts: Prompts, *, multimask: bool = True) -> tuple[Tensor, Tensor]:
        """Logits (k, m, s / 4, s / 4) and IoU (k, m) of prompts that `prepare` has checked."""
        embedding = self.checked(embedding)
        encoder, decoder = self.model.prompt_encoder, self.model.mask_decoder
        position = encoder.position()
        with evaluating(encoder, decoder):
            sparse, dense = encoder(*prompts)
            image = self.side(embedding, position, dense) if prompts.masks is None else None
            logits, iou = decoder(
                embedding.features, position, sparse, dense, multimask, image=image, fine=embedding.fine
            )
        return logits[0], iou[0]

    def everything(
        self,
        image: Image | np.ndarray | Tensor | Embedding,
        *,
        options: EverythingOptions | None = None,
        max_memory: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Everything:
        """Find all masks of a picture; see `volvelle.systems.segmentation.sam.everything.everything`."""
        from volvelle.systems.segmentation.sam.everything import everything

        return everything(self, image, options=options, max_memory=max_memory, progress=progress)

    def weights(self) -> str:
        """The `fingerprint` of the image encoder's weights as they are now."""
        now = mark(self.model.image_encoder)
        if self._weights is None or self._weights[0] != now:
            self._weights = now, fingerprint(self.model.image_encoder)
        return self._weights[1]

    def side(self, embedding: Embedding, position: Tensor, dense: Tensor) -> ImageSide:
        """What all prompts without a mask share of a picture: computed with the first, and when the decoder changes."""
        decoder, device = self.model.mask_decoder, embedding.features.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        now = mark(self.model.prompt_encoder, decoder), embedding.features.data_ptr(), autocast
        kept = self._sides.get(embedding)
        if kept is None or kept.decoder is not decoder or kept.mark != now:
            kept = _Side(decoder, now, decoder.look(embedding.features, position, dense))
            self._sides[embedding] = kept
        return kept.image

    def checked(self, embedding: Embedding) -> Embedding:
        """The embedding, in the decoder's dtype. Raises VolvelleError for one that this model did not compute."""
        config = self.model.config
        wanted = (1, config.width, config.grid, config.grid)
        tip = "embed the picture with this model"
        if tuple(embedding.features.shape) != wanted or embedding.model != config.name:
            raise VolvelleError(
                f"predict: an embedding of {embedding.model} {tuple(embedding.features.shape)}, but the model is "
                f"{config.name} and makes {wanted}",
                tip=tip,
            )
        fine = tuple((1, *shape) for shape in config.fine)
        if tuple(tuple(one.shape) for one in embedding.fine) != fine:
            raise VolvelleError(
                f"predict: the embedding has finer maps {[tuple(one.shape) for one in embedding.fine]}, but the model "
                f"makes {list(fine)}",
                tip=tip,
            )
        if embedding.weights and embedding.weights != self.weights():
            raise VolvelleError(
                f"predict: an embedding of other weights ({embedding.weights}) than the model's ({self.weights()})",
                tip=tip,
            )
        kept = self.model.prompt_encoder.no_mask_embed.weight.dtype
        if embedding.features.dtype == kept:
            return embedding
        features, *maps = (one.to(kept) for one in (embedding.features, *embedding.fine))
        return replace(embedding, features=features, fine=tuple(maps))


class _Side(NamedTuple):
    """A picture as a decoder's first block meets it, and the state of the decoder that it was computed in."""

    decoder: MaskDecoder
    mark: Hashable
    image: ImageSide


def enlarged(logits: Tensor, embedding: Embedding, *, threshold: float = THRESHOLD) -> Tensor:
    """Masks bool (k, m, Y, X) of logits (k, m, s / 4, s / 4): to the input, without its padding, to the picture.

    Both steps are bilinear. It goes over a few masks, or some rows of one, at a time, so that next to the masks
    themselves memory holds a bounded number of logits.
    """
    (height, width), (y, x) = embedding.original, embedding.scaled
    flat = logits.flatten(0, 1).unsqueeze(1)
    out = torch.empty(flat.shape[0], height, width, dtype=torch.bool, device=logits.device)
    at_once = max(1, BAND // max(height * width, embedding.size**2))
    for start in range(0, flat.shape[0], at_once):
        part = flat[start : start + at_once].float()
        inner = F.interpolate(part, size=(embedding.size,) * 2, mode="bilinear", align_corners=False)[..., :y, :x]
        if height * width <= BAND:
            whole = F.interpolate(inner, size=(height, width), mode="bilinear", align_corners=False)
            torch.gt(whole[:, 0], threshold, out=out[start : start + at_once])
            continue
        for top in range(0, height, max(1, BAND // width)):
            rows = _rows(inner, height, top, min(height, top + max(1, BAND // width)))
            band = F.interpolate(rows, size=(rows.shape[2], width), mode="bilinear", align_corners=False)
            torch.gt(band[:, 0], threshold, out=out[start : start + at_once, top : top + rows.shape[2]])
    return out.view(*logits.shape[:2], height, width)


def _rows(x: Tensor, height: int, top: int, bottom: int) -> Tensor:
    """Rows top to bottom of x (n, 1, y, x) resized to `height`, in x's width."""
    at = (torch.arange(top, bottom, device=x.device) + 0.5) * (x.shape[2] / height) - 0.5
    at = at.clamp(0, x.shape[2] - 1)
    first = at.long()
    share = (at - first).view(-1, 1)
    return torch.lerp(x[:, :, first], x[:, :, (first + 1).clamp(max=x.shape[2] - 1)], share)
