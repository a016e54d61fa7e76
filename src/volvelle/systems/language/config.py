"""What a decoder-only (or masked) language model is made of, as frozen data: each field names a component.

A configuration chooses parts, it does not switch behaviour on and off: `position=Rope(...)` against
`position=Learned(...)`, `norm=RMSNorm(...)` against `norm=LayerNorm(...)`. This file does not import torch, so the
command line can show and check a configuration without loading it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeScaling:
    """Stretching of the rotary frequencies beyond the trained context; `kind` as in Hugging Face's `rope_type`."""

    kind: Literal["linear", "dynamic", "yarn", "longrope", "llama3"]
    factor: float = 1.0
    original_context: int | None = None
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021). `dim` is the number of rotated features a head (None: all)."""

    base: float = 10000.0
    layout: Literal["half", "interleaved"] = "half"
    dim: int | None = None
    scaling: RopeScaling | None = None
    rotate_value: bool = False


@dataclass(frozen=True)
class Learned:
    """A trained vector for each absolute position (GPT-2)."""


@dataclass(frozen=True)
class Sinusoidal:
    """The fixed sine and cosine table of Vaswani et al. 2017, added to the token embeddings."""

    base: float = 10000.0


@dataclass(frozen=True)
class RMSNorm:
    """x / rms(x) * weight (Zhang & Sennrich 2019)."""

    eps: float = 1e-5


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / std * weight + bias (Ba et al. 2016)."""

    eps: float = 1e-5


@dataclass(frozen=True)
class GatedMLP:
    """down(act(gate(x)) * up(x)): SwiGLU when `activation` is silu (Shazeer 2020)."""

    width: int
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    bias: bool = False


@dataclass(frozen=True)
class MLP:
    """down(act(up(x))), the two-layer network of the original Transformer."""

    width: int
    activation: Literal["relu", "silu", "gelu", "gelu_tanh"] = "gelu_tanh"
    bias: bool = True


@dataclass(frozen=True)
class Head:
    """Hidden states -> logits. `transform` puts BERT's dense + activation + LayerNorm before the projection."""

    tied: bool = True
    bias: bool = False
    transform: Literal["gelu", "gelu_tanh", "relu"] | None = None


@dataclass(frozen=True)
class LanguageConfig:
    """One decoder: `depth` blocks of attention and MLP over `width` features.

    `order` is "pre" (Llama, GPT-2: x + f(norm(x)), one norm at the end) or "post" (BERT, RoFormer: norm(x + f(x)),
    one norm after the embeddings). `causal=False` makes a masked language model. `segments` > 0 adds that many
    token-type embeddings; `embedding_width` below `width` adds a projection after the embeddings (RoFormer).
    `family` is the name used in Hugging Face's config.json, which chooses the key map when saving.
    """

    family: Literal["llama", "qwen2", "gpt2", "roformer"]
    vocabulary: int
    width: int
    depth: int
    heads: int
    context: int
    norm: RMSNorm | LayerNorm
    mlp: GatedMLP | MLP
    position: Rope | Learned | Sinusoidal
    kv_heads: int | None = None
    head_width: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    order: Literal["pre", "post"] = "pre"
    causal: bool = True
    segments: int = 0
    embedding_width: int | None = None
    head: Head = Head()
    dropout: float = 0.0
