"""Segment Anything as two ONNX files: the image encoder, and everything that answers a prompt.

encoder.onnx: `pixels` (b, 3, s, s), normalised, zeros where the picture ends -> `image_embeddings`
(b, c, s / 16, s / 16).

decoder.onnx: `image_embeddings` (1, c, s / 16, s / 16), `point_coords` (k, n, 2), `point_labels` (k, n), `mask_input`
(k, 1, s / 4, s / 4), `has_mask_input` (1,) -> `low_res_masks` (k, 4, s / 4, s / 4), `iou_predictions` (k, 4).

An image encoder with finer maps gives two more, `high_res_feats_1` (b, c / 4, s / 8, s / 8) and `high_res_feats_0`
(b, c / 8, s / 4, s / 4), which decoder.onnx then wants behind its other inputs: SAM 2's names for them.

Names and meaning are those of Meta's export of the decoder, all in fp32: coordinates are pixels of the input; labels
are 1 foreground, 0 background, 2 and 3 a box's corners, -1 nothing, and prompts without a box end with one of those. Of
the masks the first is the one for a clear prompt, the others are for an ambiguous one. k, n and b are free.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from volvelle.systems.modes import evaluating
from volvelle.systems.onnx_files import check_exports, write_onnx
from volvelle.systems.segmentation.sam.model import Sam

FINE = ("high_res_feats_1", "high_res_feats_0")
ENCODER, DECODER = "encoder.onnx", "decoder.onnx"


class PictureEncoder(nn.Module):
    """The image encoder with all it gives: what encoder.onnx holds."""

    def __init__(self, model: Sam):
        super().__init__()
        self.image_encoder = model.image_encoder

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the embedding and the finer maps."""
        found = self.image_encoder.features(pixels)
        return found.embedding, *found.fine


class PromptAnswerer(nn.Module):
    """Prompt encoder and mask decoder in one call of tensors, without a branch: what decoder.onnx holds."""

    def __init__(self, model: Sam):
        super().__init__()
        self.prompt_encoder, self.mask_decoder = model.prompt_encoder, model.mask_decoder

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        high_res_feats_1: Tensor | None = None,
        high_res_feats_0: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of all masks and their estimated IoU."""
        encoder = self.prompt_encoder
        sparse = encoder.embed(point_coords, point_labels).unsqueeze(0)
        without = encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        dense = torch.where(has_mask_input > 0, encoder.mask_downscaling(mask_input), without).unsqueeze(0)
        fine = [one for one in (high_res_feats_1, high_res_feats_0) if one is not None]
        logits, iou = self.mask_decoder.decode(
            image_embeddings, encoder.position(), sparse, dense, None, None, fine=fine
        )
        return logits[0], iou[0]


def export_onnx(model: Sam, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write encoder.onnx and decoder.onnx into a folder and return their paths.

    The model is left as it was; weights are written in fp32. Raises VolvelleError where onnx or onnxscript is missing.
    """
    check_exports(model)
    config, device = model.config, model.prompt_encoder.no_mask_embed.weight.device
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    b, k, n = (torch.export.Dim(name, min=1) for name in ("b", "k", "n"))
    pixels = torch.zeros(2, 3, config.size, config.size, device=device)
    embedding = torch.zeros(1, config.width, config.grid, config.grid, device=device)
    side = config.size // 4
    prompts = (torch.zeros(2, 3, 2), torch.zeros(2, 3), torch.zeros(2, 1, side, side), torch.zeros(1))
    fine, named = tuple(torch.zeros(1, *shape) for shape in config.fine), FINE[: len(config.fine)]
    whole, answerer = PictureEncoder(model), PromptAnswerer(model)
    with torch.no_grad(), evaluating(model, whole, answerer):
        given = (("pixels",), ("image_embeddings", *named))
        encoder = write_onnx(whole, (pixels,), target / ENCODER, free=({0: b},), names=given)
        names = ("image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input", *named)
        free = (None, {0: k, 1: n}, {0: k, 1: n}, {0: k}, None, *(None for _ in fine))
        inputs = (embedding, *(x.to(device) for x in (*prompts, *fine)))
        given = (names, ("low_res_masks", "iou_predictions"))
        decoder = write_onnx(answerer, inputs, target / DECODER, free=free, names=given)
    return encoder, decoder
