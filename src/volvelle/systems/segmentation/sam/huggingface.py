"""Configurations of transformers' SamModel folders, both ways: config.json and preprocessor_config.json."""

from __future__ import annotations

from typing import Any

from volvelle.errors import VolvelleError
from volvelle.systems.segmentation.sam.config import STRIDE, Decoder, SamConfig, ViT

_VISION = {
    "hidden_size": 768, "output_channels": 256, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 1024,
    "layer_norm_eps": 1e-6, "window_size": 14, "global_attn_indexes": [2, 5, 8, 11], "mlp_ratio": 4.0,
}  # fmt: skip
_MASKS = {
    "mlp_dim": 2048, "num_hidden_layers": 2, "num_attention_heads": 8, "attention_downsample_rate": 2,
    "num_multimask_outputs": 3, "iou_head_depth": 3, "iou_head_hidden_dim": 256, "layer_norm_eps": 1e-6,
}  # fmt: skip
"""transformers leaves out of config.json what has its own default."""
_FIXED = {
    "vision_config": {
        "patch_size": STRIDE, "num_channels": 3, "hidden_act": "gelu", "qkv_bias": True, "use_abs_pos": True,
        "use_rel_pos": True,
    },
    "prompt_encoder_config": {"patch_size": STRIDE, "num_point_embeddings": 4, "hidden_act": "gelu"},
    "mask_decoder_config": {"hidden_act": "relu"},
}  # fmt: skip
"""What their model could vary and no released one does."""


def from_huggingface(values: dict[str, Any], preprocessing: dict[str, Any], source: str) -> SamConfig:
    """Our configuration of theirs. Raises VolvelleError that names `source` and the value that we have no model for."""
    sections = {name: values.get(name) or {} for name in _FIXED}
    for name, fixed in _FIXED.items():
        for key, value in fixed.items():
            if sections[name].get(key, value) != value:
                raise VolvelleError(f"{source}: {name}: {key} = {sections[name][key]!r}, but only {value!r} is known")
    vision = _VISION | sections["vision_config"]
    masks = _MASKS | sections["mask_decoder_config"]
    prompts = {"mask_input_channels": 16} | sections["prompt_encoder_config"]
    encoder = ViT(
        vision["hidden_size"],
        vision["num_hidden_layers"],
        vision["num_attention_heads"],
        tuple(vision["global_attn_indexes"]),
        vision["window_size"],
        vision.get("mlp_dim") or int(vision["hidden_size"] * vision["mlp_ratio"]),
        vision["layer_norm_eps"],
    )
    decoder = Decoder(
        masks["num_hidden_layers"],
        masks["num_attention_heads"],
        masks["mlp_dim"],
        masks["attention_downsample_rate"],
        masks["num_multimask_outputs"],
        masks["iou_head_depth"],
        masks["iou_head_hidden_dim"],
        masks["layer_norm_eps"],
    )
    pictures = {
        ours: tuple(preprocessing[theirs])
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))
        if theirs in preprocessing
    }
    return SamConfig(
        values.get("volvelle_name", "sam"),
        encoder,
        vision["image_size"],
        vision["output_channels"],
        decoder,
        prompts["mask_input_channels"],
        **pictures,
    )


def to_huggingface(config: SamConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and preprocessor_config.json of a model with a ViT."""
    encoder, decoder = config.encoder, config.decoder
    assert isinstance(encoder, ViT)
    vision = {
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "mlp_dim": encoder.mlp,
        "mlp_ratio": encoder.mlp / encoder.width,
        "window_size": encoder.window,
        "global_attn_indexes": list(encoder.everywhere),
        "layer_norm_eps": encoder.eps,
        "image_size": config.size,
        "output_channels": config.width,
        "num_pos_feats": config.width // 2,
    }
    prompts = {
        "hidden_size": config.width,
        "image_size": config.size,
        "mask_input_channels": config.mask_channels,
        "image_embedding_size": config.grid,
    }
    masks = {
        "hidden_size": config.width,
        "mlp_dim": decoder.mlp,
        "num_hidden_layers": decoder.depth,
        "num_attention_heads": decoder.heads,
        "attention_downsample_rate": decoder.downsample,
        "num_multimask_outputs": decoder.masks,
        "iou_head_depth": decoder.iou_depth,
        "iou_head_hidden_dim": decoder.iou_width,
        "layer_norm_eps": decoder.eps,
    }
    sections = {"vision_config": vision, "prompt_encoder_config": prompts, "mask_decoder_config": masks}
    kinds = dict(zip(sections, ("sam_vision_model", "sam_prompt_encoder", "sam_mask_decoder"), strict=True))
    values = {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "volvelle_name": config.name,
        **{name: {"model_type": kinds[name], **_FIXED[name], **section} for name, section in sections.items()},
    }
    side, small = config.size, config.size // 4
    preprocessing = {
        "image_processor_type": "SamImageProcessor",
        "processor_class": "SamProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_pad": True,
        "resample": 2,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        "size": {"longest_edge": side},
        "pad_size": {"height": side, "width": side},
        "mask_size": {"longest_edge": small},
        "mask_pad_size": {"height": small, "width": small},
    }
    return values, preprocessing
