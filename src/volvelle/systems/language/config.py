"""What a decoder-only (or masked) language model is made of, as frozen data: each field names a component.

A configuration chooses parts, it does not switch behaviour on and off: `position=Rope(...)` against
`position=Learned(...)`, `norm=RMSNorm(...)` against `norm=LayerNorm(...)`. This file does not import torch, so the
command line can show and check a configuration without loading it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["llama", "qwen2", "gpt2", "roformer"]
Activation = Literal["relu", "silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023): every frequency divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """Dynamic NTK: past `original_context` the base grows with the length of the sequence.

    None takes the model's `context` (Hugging Face's max_position_embeddings).
    """

    factor: float
    original_context: int | None = None


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023): slow frequencies interpolated, fast ones kept, a ramp between, scores scaled.

    `attention_factor` multiplies cosines and sines; None derives it from `factor` (and the two mscales if given).
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024): one divisor a frequency, one set up to `original_context`, another beyond it."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_context: int
    factor: float | None = None
    attention_factor: float | None = None


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long waves divided by `factor`, short waves kept, a linear blend between the two borders."""

    factor: float
    original_context: int
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0


RopeScaling = LinearScaling | DynamicScaling | YarnScaling | LongRopeScaling | Llama3Scaling


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
    activation: Activation = "silu"
    bias: bool = False


@dataclass(frozen=True)
class MLP:
    """down(act(up(x))), the two-layer network of the original Transformer."""

    width: int
    activation: Activation = "gelu_tanh"
    bias: bool = True


@dataclass(frozen=True)
class Head:
    """Hidden states -> logits. `transform` puts BERT's dense + activation + norm before the projection."""

    tied: bool = True
    bias: bool = False
    transform: Activation | None = None


@dataclass(frozen=True)
class Dropout:
    """Share of features set to zero while training: after the embeddings, after each branch, on attention weights."""

    embedding: float = 0.0
    residual: float = 0.0
    attention: float = 0.0


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids the model was trained with; generation stops at any of `eos`."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


@dataclass(frozen=True)
class LanguageConfig:
    """One decoder: `depth` blocks of attention and MLP over `width` features.

    `order` is "pre" (Llama, GPT-2: x + f(norm(x)), one norm at the end) or "post" (BERT, RoFormer: norm(x + f(x)),
    one norm after the embeddings). `causal=False` makes a masked language model. `segments` > 0 adds that many
    token-type embeddings; `embedding_width` unlike `width` adds a projection after the embeddings (RoFormer).
    `family` is the name used in Hugging Face's config.json, which chooses the key map when saving.

    Raises ValueError for sizes that do not fit together.

    >>> config = LanguageConfig(
    ...     "llama", vocabulary=100, width=48, depth=2, heads=4, context=64,
    ...     norm=RMSNorm(), mlp=GatedMLP(96), position=Rope(), kv_heads=2,
    ... )
    >>> config.head_width, config.kv_heads
    (12, 2)
    """

    family: Family
    vocabulary: int
    width: int
    depth: int
    heads: int
    context: int
    norm: RMSNorm | LayerNorm
    mlp: GatedMLP | MLP
    position: Rope | Learned | Sinusoidal
    kv_heads: int = 0
    head_width: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    order: Literal["pre", "post"] = "pre"
    causal: bool = True
    segments: int = 0
    embedding_width: int = 0
    head: Head = Head()
    dropout: Dropout = Dropout()
    special: SpecialTokens = SpecialTokens()
    init_std: float = 0.02

    def __post_init__(self):
        # 0 stands for "derived"; the derived number is stored, so equal models have equal configurations.
        derived = {
            "kv_heads": self.kv_heads or self.heads,
            "embedding_width": self.embedding_width or self.width,
            "head_width": self.head_width or self.width // max(self.heads, 1),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        for name in ("vocabulary", "width", "depth", "heads", "context", "kv_heads", "head_width", "embedding_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"LanguageConfig: {name} must be positive, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"LanguageConfig: heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        rotated = self.rotated
        if rotated % 2 or rotated > self.head_width:
            raise ValueError(
                f"LanguageConfig: rotated features must be even, at most head_width ({self.head_width}), got {rotated}"
            )
        if self.head.tied and self.head.transform is None and self.embedding_width != self.width:
            raise ValueError(
                f"LanguageConfig: a tied head without transform needs embedding_width == width, "
                f"got {self.embedding_width} and {self.width}"
            )

    @property
    def rotated(self) -> int:
        """Features of each head that the rotary embedding turns; 0 without one."""
        if not isinstance(self.position, Rope):
            return 0
        return self.head_width if self.position.dim is None else self.position.dim
