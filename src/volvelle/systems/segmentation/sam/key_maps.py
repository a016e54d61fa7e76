"""Which tensor of a released checkpoint is which of ours: Meta's names are ours, transformers' follow these rules."""

from __future__ import annotations

from volvelle.systems.key_map import KeyMap, Rule
from volvelle.systems.segmentation.sam.config import Decoder

META = KeyMap(
    (Rule("{rest}", ("{rest}",)),),
    ignored=("pixel_mean", "pixel_std"),  # of the pictures, which some copies hold beside the weights
)
"""Names of Meta's segment-anything."""

SHARED = "shared_image_embedding.positional_embedding"


def transformers(decoder: Decoder) -> KeyMap:
    """Names of transformers' SamModel; the layers of its small networks are counted from their ends."""
    encoder, prompts, masks = "image_encoder.", "prompt_encoder.", "mask_decoder."
    blocks, two_way = "blocks.{i}.", "transformer.layers.{i}."
    pairs = [
        ("vision_encoder.pos_embed", f"{encoder}pos_embed"),
        ("vision_encoder.patch_embed.projection.{p}", f"{encoder}patch_embed.proj.{{p}}"),
        ("vision_encoder.layers.{i}.layer_norm{j}.{p}", f"{encoder}{blocks}norm{{j}}.{{p}}"),
        ("vision_encoder.layers.{i}.{rest}", f"{encoder}{blocks}{{rest}}"),
        *_numbered("vision_encoder.neck.", f"{encoder}neck.", ("conv1", "layer_norm1", "conv2", "layer_norm2")),
        (SHARED, f"{prompts}pe_layer.positional_encoding_gaussian_matrix"),
        ("prompt_encoder.point_embed.{i}.{p}", f"{prompts}point_embeddings.{{i}}.{{p}}"),
        *_numbered(
            "prompt_encoder.mask_embed.",
            f"{prompts}mask_downscaling.",
            ("conv1", "layer_norm1", "", "conv2", "layer_norm2", "", "conv3"),
        ),
        ("mask_decoder.transformer.layers.{i}.layer_norm{j}.{p}", f"{masks}{two_way}norm{{j}}.{{p}}"),
        ("mask_decoder.transformer.layer_norm_final_attn.{p}", f"{masks}transformer.norm_final_attn.{{p}}"),
        *_numbered(
            "mask_decoder.",
            f"{masks}output_upscaling.",
            ("upscale_conv1", "upscale_layer_norm", "", "upscale_conv2"),
        ),
        *_network("mask_decoder.output_hypernetworks_mlps.{i}.", f"{masks}output_hypernetworks_mlps.{{i}}.", 3),
        *_network("mask_decoder.iou_prediction_head.", f"{masks}iou_prediction_head.", decoder.iou_depth),
        ("{rest}", "{rest}"),
    ]
    rules = tuple(Rule(theirs, (ours,)) for theirs, ours in pairs)
    return KeyMap(rules, aliases={"prompt_encoder.shared_embedding.positional_embedding": SHARED})


def _numbered(theirs: str, ours: str, names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Layers that we number and they name; "" is one without weights."""
    return [(f"{theirs}{name}.{{p}}", f"{ours}{i}.{{p}}") for i, name in enumerate(names) if name]


def _network(theirs: str, ours: str, depth: int) -> list[tuple[str, str]]:
    names = ["proj_in", *(f"layers.{i}" for i in range(depth - 2)), "proj_out"]
    return [(f"{theirs}{name}.{{p}}", f"{ours}layers.{i}.{{p}}") for i, name in enumerate(names)]
