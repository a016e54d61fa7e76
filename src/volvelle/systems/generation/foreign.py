"""config.json of two libraries and back: diffusers' VQModel and transformers' ChameleonVQVAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.generation.config import VQGANConfig

DIFFUSERS, CHAMELEON = "VQModel", "chameleon_vqgan"
"""What config.json calls them: `_class_name` of the one, `model_type` of the other."""
_ONLY = {"act_fn": "silu", "norm_type": "group"}
_DOWN, _UP = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


def from_diffusers(values: Mapping[str, Any], source: str) -> VQGANConfig:
    """The configuration of a VQModel. Raises VolvelleError for one with blocks or norms that VQGAN does not have."""
    widths = list(values.get("block_out_channels") or [64])
    down = list(values.get("down_block_types") or [_DOWN[0]])
    up = list(values.get("up_block_types") or [_UP[0]])
    for name, wanted in _ONLY.items():
        if values.get(name, wanted) != wanted:
            raise VolvelleError(f"{source}: {name}={values[name]} is no VQGAN's; {wanted} is wanted")
    strange = [name for name in (*down, *up) if name not in (*_DOWN, *_UP)]
    if strange or [_UP.index(name) for name in up[::-1]] != [_DOWN.index(name) for name in down]:
        raise VolvelleError(f"{source}: blocks {', '.join(strange or [*down, *up])} are no VQGAN's")
    if any(width % widths[0] for width in widths) or len(widths) != len(down):
        raise VolvelleError(f"{source}: block_out_channels {widths} are not multiples of the first, one a block")
    channels = values.get("in_channels", 3)
    if values.get("out_channels", 3) != channels:
        raise VolvelleError(f"{source}: makes pictures of {values.get('out_channels')} channels from {channels}")
    latent, factor = values.get("latent_channels", 3), 2 ** (len(widths) - 1)
    return VQGANConfig(
        "vqgan",
        channels,
        max(1, values.get("sample_size", 32) // factor) * factor,
        widths[0],
        tuple(width // widths[0] for width in widths),
        values.get("layers_per_block", 1),
        tuple(i for i, name in enumerate(down) if name == _DOWN[1]),
        latent,
        values.get("vq_embed_dim") or latent,
        values.get("num_vq_embeddings", 256),
        beta_on="codebook",
        groups=values.get("norm_num_groups", 32),
        middle_attention=values.get("mid_block_add_attention", True),
    )


def to_diffusers(config: VQGANConfig) -> dict[str, Any]:
    """config.json of a VQModel."""
    attends = [int(level in config.attention) for level in range(len(config.multipliers))]
    return {
        "_class_name": DIFFUSERS,
        "_diffusers_version": "0.30.0",
        "act_fn": "silu",
        "block_out_channels": [config.width * m for m in config.multipliers],
        "down_block_types": [_DOWN[which] for which in attends],
        "up_block_types": [_UP[which] for which in attends[::-1]],
        "in_channels": config.channels,
        "out_channels": config.channels,
        "latent_channels": config.latent,
        "layers_per_block": config.depth,
        "mid_block_add_attention": config.middle_attention,
        "norm_num_groups": config.groups,
        "norm_type": "group",
        "num_vq_embeddings": config.codes,
        "sample_size": config.size,
        "vq_embed_dim": config.code_width,
    }


def from_chameleon(values: Mapping[str, Any], source: str) -> VQGANConfig:
    """The configuration of a ChameleonVQVAE, which is an encoder alone. Raises VolvelleError for two latents."""
    if values.get("double_latent"):
        raise VolvelleError(f"{source}: double_latent is a KL autoencoder's, not a VQGAN's")
    multipliers = tuple(values.get("channel_multiplier", (1, 1, 2, 2, 4)))
    size, attends = values.get("resolution", 512), values.get("attn_type", "vanilla") == "vanilla"
    resolutions = (values.get("attn_resolutions") or ()) if attends else ()
    return VQGANConfig(
        "chameleon",
        values.get("in_channels", 3),
        size,
        values.get("base_channels", 128),
        multipliers,
        values.get("num_res_blocks", 2),
        tuple(level for level in range(len(multipliers)) if size // 2**level in resolutions),
        values.get("latent_channels", 256),
        values.get("embed_dim", 256),
        values.get("num_embeddings", 8192),
        beta=values.get("beta", 0.25),
        beta_on="codebook",
        middle_attention=attends,
        decodes=False,
    )


def to_chameleon(config: VQGANConfig) -> dict[str, Any]:
    """config.json of a ChameleonVQVAE. Raises UsageError for what its code cannot build."""
    needs_32("transformers", config)
    if config.attention and not config.middle_attention:
        raise UsageError("transformers: Chameleon attends in the middle wherever it attends in a level")
    return {
        "architectures": ["ChameleonVQVAE"],
        "model_type": CHAMELEON,
        "attn_resolutions": [config.size // 2**level for level in config.attention] or None,
        "attn_type": "vanilla" if config.middle_attention else "none",
        "base_channels": config.width,
        "beta": config.beta,
        "channel_multiplier": list(config.multipliers),
        "double_latent": False,
        "dropout": 0.0,
        "embed_dim": config.code_width,
        "in_channels": config.channels,
        "latent_channels": config.latent,
        "num_embeddings": config.codes,
        "num_res_blocks": config.depth,
        "resolution": config.size,
        "dtype": "float32",
    }


def needs_32(library: str, config: VQGANConfig) -> None:
    """Raise UsageError where the norms have other groups than the 32 that are written into that library's code."""
    if config.groups != 32:
        raise UsageError(
            f"{library}: its norms have 32 groups, this model's {config.groups}",
            tip="to='diffusers' writes any; or train with model.groups=32",
        )
