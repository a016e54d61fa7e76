"""Which tensor of a foreign codec is which of ours: taming's names are ours, diffusers' follow these rules."""

from __future__ import annotations

import re

from torch import Tensor

from volvelle.systems.generation.config import VQGANConfig
from volvelle.systems.key_map import KeyMap, Rule

TAMING = KeyMap((Rule("{rest}", ("{rest}",)),), ignored=("loss.*", "model_ema.*"))
"""taming-transformers, latent diffusion and transformers' Chameleon; beside the codec lie discriminators, averages."""

_BLOCK = (("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"))
_BLOCK += (("conv_shortcut", "nin_shortcut"),)
_ATTENTION = (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))
_OLD = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
_PROJECTION = re.compile(r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$")


def diffusers(config: VQGANConfig) -> KeyMap:
    """Names of diffusers' VQModel; its decoder counts levels in the order in which they are passed."""
    last = len(config.multipliers) - 1
    pairs = [
        *_parts("{side}.mid_block.resnets.0.", "{side}.mid.block_1.", _BLOCK),
        *_parts("{side}.mid_block.resnets.1.", "{side}.mid.block_2.", _BLOCK),
        *_parts("{side}.mid_block.attentions.0.", "{side}.mid.attn_1.", _ATTENTION),
        ("{side}.conv_norm_out.{p}", "{side}.norm_out.{p}"),
    ]
    for level in range(last + 1):
        for theirs, ours, sampler in (
            (f"encoder.down_blocks.{level}.", f"encoder.down.{level}.", "downsample"),
            (f"decoder.up_blocks.{last - level}.", f"decoder.up.{level}.", "upsample"),
        ):
            pairs += _parts(f"{theirs}resnets.{{i}}.", f"{ours}block.{{i}}.", _BLOCK)
            pairs += _parts(f"{theirs}attentions.{{i}}.", f"{ours}attn.{{i}}.", _ATTENTION)
            pairs.append((f"{theirs}{sampler}rs.0.conv.{{p}}", f"{ours}{sampler}.conv.{{p}}"))
    pairs.append(("{rest}", "{rest}"))
    return KeyMap(tuple(Rule(theirs, (ours,)) for theirs, ours in pairs))


def _parts(theirs: str, ours: str, names: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    return [(f"{theirs}{there}.{{p}}", f"{ours}{here}.{{p}}") for there, here in names]


def from_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file as the rules want them: today's names, and projections as convolutions of 1 x 1."""
    found = {}
    for name, tensor in tensors.items():
        for old, new in _OLD:
            name = re.sub(rf"(\.attentions\.\d+\.){old}\.", rf"\g<1>{new}.", name)
        found[name] = tensor[:, :, None, None] if _PROJECTION.search(name) and tensor.ndim == 2 else tensor
    return found


def to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `from_diffusers`: projections are matrices there."""
    return {name: tensor[:, :, 0, 0] if _PROJECTION.search(name) else tensor for name, tensor in tensors.items()}
