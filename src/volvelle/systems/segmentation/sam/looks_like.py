"""What a checkpoint that is not Segment Anything's looks like, for errors that say so. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

MARKS = (
    (r"image_encoder\.trunk\.|memory_attention\.|memory_encoder\.|sam_mask_decoder\.", "SAM 2, a model of videos"),
    (r"mask_decoder\.(hf_token|hf_mlp|compress_vit_feat)", "SAM-HQ, whose mask decoder has a further token"),
    (r"image_encoder\.layers\.\d+\.(blocks|downsample)\.", "MobileSAM, whose image encoder is a TinyViT"),
    (r"image_encoder\.(backbone|stages)\.", "a Segment Anything with a convolutional image encoder of another kind"),
    (r"^model\.\d+\.(conv|cv\d|m\.)", "a YOLO model of ultralytics (FastSAM is one)"),
    (r"^(vision_model|text_model|visual\.transformer)", "CLIP"),
    (r"(^|\.)layers\.\d+\.self_attn\.|(^|\.)h\.\d+\.attn\.c_attn|token_embd", "a language model"),
    (r"lora_[AB]\.|lora_embedding", "a LoRA adapter"),
    (r"^(backbone\.body|rpn\.|roi_heads)|^(proposer|roi_head)\.", "a detector"),
    (r"^(conv_stem|_conv_stem|blocks\.0\.0\.conv_dw|features\.0\.0)", "an image classifier of the EfficientNet family"),
    (r"^(cls_token|blocks\.0\.attn\.qkv)|patch_embeddings", "a vision transformer without Segment Anything's decoder"),
    (r"^layer1\.0\.conv1", "a ResNet"),
    (r"^(encoder\..*|decoder\..*)", "an encoder with a decoder of another kind"),
)
"""Patterns of names, the most telling first."""


def looks_like(names: Iterable[str]) -> str:
    """What the tensors of a file are by their names.

    >>> looks_like(["model.layers.0.self_attn.q_proj.weight"])
    'a language model'
    """
    names = list(names)
    for pattern, kind in MARKS:
        if any(re.search(pattern, name) for name in names):
            return kind
    return f"something else, its first tensor is {names[0]}" if names else "an empty file"
