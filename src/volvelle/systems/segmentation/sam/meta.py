"""Checkpoints of Meta's segment-anything: a state dict without a configuration, which its shapes give back.

What shapes do not show is as in every released model: 8 heads in the mask decoder, and torch's constant in its norms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from volvelle.errors import VolvelleError
from volvelle.systems.segmentation.sam.config import PRESETS, STRIDE, Decoder, SamConfig, ViT

HEADS = 8
"""Of the mask decoder, in every model that Meta's code builds."""
_BLOCKS = "image_encoder.blocks."
_TWO_WAY = "mask_decoder.transformer.layers."


def config_of(tensors: Mapping[str, Tensor], source: str, *, decoder_heads: int = HEADS) -> SamConfig:
    """The configuration of a model with a ViT, from the shapes of its tensors, under Meta's names.

    Raises VolvelleError that names `source` and the tensor that is missing or makes no sense.
    """
    try:
        _, grid, _, width = tensors["image_encoder.pos_embed"].shape
        depth = _count(tensors, _BLOCKS)
        lengths = [tensors[f"{_BLOCKS}{i}.attn.rel_pos_h"].shape[0] for i in range(depth)]
        head = tensors[f"{_BLOCKS}0.attn.rel_pos_h"].shape[1]
        everywhere = tuple(i for i, length in enumerate(lengths) if length == 2 * grid - 1)
        inside = {length for length in lengths if length != 2 * grid - 1}
        encoder = ViT(
            width,
            depth,
            width // head,
            everywhere,
            (inside.pop() + 1) // 2 if inside else grid,
            tensors[f"{_BLOCKS}0.mlp.lin1.weight"].shape[0],
        )
        channels = tensors["prompt_encoder.no_mask_embed.weight"].shape[1]
        narrow = tensors[f"{_TWO_WAY}0.cross_attn_token_to_image.k_proj.weight"].shape[0]
        iou = "mask_decoder.iou_prediction_head.layers."
        decoder = Decoder(
            depth=_count(tensors, _TWO_WAY),
            heads=decoder_heads,
            mlp=tensors[f"{_TWO_WAY}0.mlp.lin1.weight"].shape[0],
            downsample=channels // narrow,
            masks=tensors["mask_decoder.mask_tokens.weight"].shape[0] - 1,
            iou_depth=_count(tensors, iou),
            iou_width=tensors[f"{iou}0.weight"].shape[0],
        )
        masks = tensors["prompt_encoder.mask_downscaling.3.weight"].shape[0]
    except KeyError as error:
        raise VolvelleError(f"{source}: Segment Anything's, but {error.args[0]} is missing") from error
    except ValueError as error:
        raise VolvelleError(f"{source}: image_encoder.pos_embed is not (1, g, g, c) ({error})") from error
    config = SamConfig("sam", encoder, STRIDE * grid, channels, decoder, masks)
    return _named(config)


def _named(config: SamConfig) -> SamConfig:
    """The released model of these sizes, or the configuration as it is."""
    for preset in PRESETS.values():
        known = preset(config.size)
        if (known.encoder, known.decoder, known.width) == (config.encoder, config.decoder, config.width):
            return known
    return config


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered parts there are below a name."""
    found = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in tensors)
    return max((int(match[1]) + 1 for match in found if match), default=0)
