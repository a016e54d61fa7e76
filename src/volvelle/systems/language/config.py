"""What a decoder-only (or masked) language model is made of, as frozen data: each field names a component.

A configuration chooses parts, it does not switch behaviour on and off: `position=Rope(...)` against
`position=Learned(...)`, `norm=RMSNorm(...)` against `norm=LayerNorm(...)`. This file does not import torch, so the
command line can show and check a configuration without loading it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from volvelle.systems.language.position_config import (  # noqa: F401 -- read as config.Rope
    T5,
    ALiBi,
    Complex,
    Convolutional,
    DeBERTa,
    Dynamic,
    DynamicScaling,
    Hierarchical,
    Learned,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Multiplicative,
    NoPosition,
    NtkScaling,
    Position,
    ProportionalScaling,
    Recurrent,
    Rope,
    RopeScaling,
    ScoreBias,
    Shaw,
    Sinusoidal,
    TransformerXL,
    YarnScaling,
    completed,
)  # fmt: skip

Family = Literal["llama", "qwen2", "gpt2", "roformer", "volvelle"]
Activation = Literal["relu", "silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class SoftmaxAttention:
    """softmax(q · k) v over all tokens so far, decoded with a cache of keys and values (Vaswani et al. 2017)."""


@dataclass(frozen=True)
class LinearAttention:
    """φ(q) · φ(k) in place of exp(q · k), decoded with a state of fixed size (Katharopoulos et al. 2020).

    Rotary positions turn the numerator only (Su et al. 2021, section 3.3). `chunk` tokens are written out at a time;
    `eps` is added to the denominator.
    """

    chunk: int = 128
    eps: float = 1e-6


Attention = SoftmaxAttention | LinearAttention


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
    token-type embeddings; `embedding_width` unlike `width` adds a projection after the embeddings (RoFormer);
    `embedding_scale` multiplies token embeddings (sqrt(width) in Vaswani et al. 2017, whose sinusoids are of size 1).
    `family` is the name used in Hugging Face's config.json, which chooses the key map when saving; "volvelle" is our
    own, for what none of the others can hold.

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
    position: Position
    attention: Attention = SoftmaxAttention()
    kv_heads: int = 0
    head_width: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    order: Literal["pre", "post"] = "pre"
    causal: bool = True
    segments: int = 0
    embedding_width: int = 0
    embedding_scale: float = 1.0
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
        self._check_attention()
        if isinstance(self.position, Rope) and self.position.scaling is not None:
            scaling = completed(self.position.scaling, rotated, self.context)
            object.__setattr__(self, "position", replace(self.position, scaling=scaling))

    def _check_attention(self) -> None:
        position = self.position
        if isinstance(position, DeBERTa) and not (position.terms and {*position.terms} <= {"c2p", "p2c"}):
            raise ValueError(f"LanguageConfig: DeBERTa has the terms c2p and p2c, at least one, got {position.terms}")
        if isinstance(self.attention, SoftmaxAttention):
            return
        if isinstance(position, ScoreBias):
            raise ValueError(
                f"LanguageConfig: {type(position).__name__} adds to attention scores, and linear attention has none"
            )
        if self.dropout.attention:
            raise ValueError(
                f"LanguageConfig: linear attention has no weights to drop, got dropout.attention = "
                f"{self.dropout.attention}"
            )

    @property
    def rotated(self) -> int:
        """Features of each head that the rotary embedding turns; 0 without one."""
        if not isinstance(self.position, Rope):
            return 0
        return self.head_width if self.position.dim is None else self.position.dim
