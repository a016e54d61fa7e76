"""Checkpoints of taming-transformers and latent diffusion: the configuration from shapes, and their YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from volvelle.errors import VolvelleError
from volvelle.systems.generation.config import VQGANConfig

STAGE = "first_stage_model."
"""What latent diffusion's whole models put before the names of their codec."""
MARK = "encoder.conv_in.weight"
OURS = "volvelle"
"""The section of a YAML file that holds what neither taming's classes nor shapes can say."""


def codec_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The codec's tensors of a file, which may be a part of a larger model."""
    if any(name.startswith(STAGE) for name in tensors):
        tensors = {name.removeprefix(STAGE): value for name, value in tensors.items() if name.startswith(STAGE)}
    return dict(tensors)


def config_of(tensors: Mapping[str, Tensor], source: str, *, size: int | None = None) -> VQGANConfig:
    """The configuration of a file with taming's names. `size` is the side of its pictures, else what fits, 256 say.

    Raises VolvelleError for a codec of another kind, which it names.
    """
    if "quantize.embedding.weight" not in tensors:
        raise VolvelleError(f"{source}: {_other_kind(tensors)}")
    try:
        width, channels = tensors[MARK].shape[:2]
        levels = _count(tensors, "encoder.down.")
        multipliers = tuple(tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // width for i in range(levels))
        codes, code_width = tensors["quantize.embedding.weight"].shape
        latent = tensors["encoder.conv_out.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise VolvelleError(f"{source}: a codec with taming's names, but {error.args[0]} is missing") from error
    factor = 2 ** (levels - 1)
    return VQGANConfig(
        "vqgan",
        channels,
        size or max(1, 256 // factor) * factor,
        width,
        multipliers,
        _count(tensors, "encoder.down.0.block."),
        tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in tensors),
        latent,
        code_width,
        codes,
        "means" if "quantize.embedding.cluster_size" in tensors else "loss",
        beta_on="commitment" if "quantize.embedding.cluster_size" in tensors else "codebook",
        middle_attention="encoder.mid.attn_1.q.weight" in tensors,
        decodes="decoder.conv_in.weight" in tensors,
    )


def _other_kind(tensors: Mapping[str, Tensor]) -> str:
    if "quantize.embed.weight" in tensors or "quantize.proj.weight" in tensors:
        return "a Gumbel-VQ, whose codes come from a projection and not from the nearest vector; it is not read"
    if MARK in tensors and "quant_conv.weight" in tensors:
        return "a KL autoencoder: it has no codebook"
    return f"no VQGAN: its first tensor is {next(iter(tensors), 'missing')}"


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered parts there are below a name."""
    found = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in tensors)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def beside(path: Path) -> dict[str, Any]:
    """The YAML file that belongs to a checkpoint: of its name, config.yaml or model.yaml; {} where there is none.

    Raises VolvelleError for one that cannot be read.
    """
    for name in (f"{path.stem}.yaml", "config.yaml", "model.yaml"):
        file = path.with_name(name)
        if file.is_file():
            try:
                values = yaml.safe_load(file.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise VolvelleError(f"{file}: cannot be read ({str(error).splitlines()[0]})") from error
            return values if isinstance(values, dict) else {}
    return {}


def size_in(values: Mapping[str, Any]) -> int | None:
    """The side of the pictures by taming's or latent diffusion's YAML."""
    found: Any = values
    for name in ("model", "params"):
        found = found.get(name) if isinstance(found, Mapping) else None
    if isinstance(found, Mapping) and isinstance(found.get("first_stage_config"), Mapping):
        found = found["first_stage_config"].get("params")
    found = found.get("ddconfig") if isinstance(found, Mapping) else None
    size = found.get("resolution") if isinstance(found, Mapping) else None
    return size if isinstance(size, int) and size > 0 else None


def to_yaml(config: VQGANConfig) -> str:
    """The YAML from which taming's VQModel is built, with our own configuration beside it."""
    params = {
        "embed_dim": config.code_width,
        "n_embed": config.codes,
        "ddconfig": {
            "double_z": False,
            "z_channels": config.latent,
            "resolution": config.size,
            "in_channels": config.channels,
            "out_ch": config.channels,
            "ch": config.width,
            "ch_mult": list(config.multipliers),
            "num_res_blocks": config.depth,
            "attn_resolutions": [config.size // 2**level for level in config.attention],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "taming.modules.losses.DummyLoss"},
    }
    ours = {name: list(value) if isinstance(value, tuple) else value for name, value in config.to_json().items()}
    values = {"model": {"target": "taming.models.vqgan.VQModel", "params": params}, OURS: ours}
    return yaml.safe_dump(values, sort_keys=False)
