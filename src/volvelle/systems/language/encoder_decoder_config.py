"""What an encoder-decoder (BART) is made of, as frozen data, from the same components as `config.LanguageConfig`.

This file does not import torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from volvelle.systems.language.config import MLP, Dropout, Head, LanguageConfig, LayerNorm, Learned, SpecialTokens


@dataclass(frozen=True)
class Stack:
    """One side of the model: `depth` blocks of attention with `heads` heads and a feed-forward network."""

    depth: int
    heads: int
    mlp: MLP


@dataclass(frozen=True)
class Writing:
    """How answers are to be written where nothing else is asked, as transformers' generate has it.

    The fields' names and meaning are those of `decode.Beams` and `decode.Rules`; these values ask for nothing.
    """

    width: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    no_repeat_ngram_size: int = 0


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """An encoder that reads a source, and a decoder that writes an answer to it (BART, Lewis et al. 2019).

    Both sides share `width`, the token embeddings and the `context`, the most tokens of a source and of an answer; each
    block ends in a norm ("post"), and so do the embeddings. An answer begins with the token `start`, which is not part
    of it. Generation forces `forced_first` to be its first token and `forced_last` its last one where it is cut off;
    None forces nothing. `writing` is how answers are written where nothing else is asked. `embedding_scale` multiplies
    token embeddings; `activation_dropout` acts inside the MLPs.

    Raises ValueError for sizes that do not fit together.

    >>> side = Stack(depth=2, heads=4, mlp=MLP(96, "gelu"))
    >>> config = EncoderDecoderConfig("bart", vocabulary=100, width=48, encoder=side, decoder=side, context=64, start=2)
    >>> config.head_width
    12
    """

    family: Literal["bart"]
    vocabulary: int
    width: int
    encoder: Stack
    decoder: Stack
    context: int
    start: int
    norm: LayerNorm = field(default_factory=LayerNorm)
    position: Learned = field(default_factory=Learned)
    embedding_scale: float = 1.0
    head: Head = field(default_factory=Head)
    dropout: Dropout = field(default_factory=Dropout)
    activation_dropout: float = 0.0
    special: SpecialTokens = field(default_factory=SpecialTokens)
    forced_first: int | None = None
    forced_last: int | None = None
    writing: Writing = field(default_factory=Writing)
    init_std: float = 0.02

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("vocabulary", "width", "context")}
        for side in ("encoder", "decoder"):
            stack = getattr(self, side)
            sizes |= {f"{side}.{name}": getattr(stack, name) for name in ("depth", "heads")}
            sizes[f"{side}.mlp.width"] = stack.mlp.width
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"EncoderDecoderConfig: {name} must be positive, got {size}")
        for side in ("encoder", "decoder"):
            if self.width % getattr(self, side).heads:
                raise ValueError(
                    f"EncoderDecoderConfig: width ({self.width}) must be a multiple of {side}.heads "
                    f"({getattr(self, side).heads})"
                )
        tokens = {"start": self.start, "forced_first": self.forced_first, "forced_last": self.forced_last}
        tokens |= {"special.pad": self.special.pad, "special.bos": self.special.bos}
        for name, token in tokens.items():
            if token is not None and not 0 <= token < self.vocabulary:
                raise ValueError(f"EncoderDecoderConfig: {name} = {token} is outside the vocabulary {self.vocabulary}")
        if self.head != dataclasses.replace(Head(), tied=self.head.tied):
            raise ValueError(f"EncoderDecoderConfig: the head is one matrix, tied or not, got {self.head}")

    @property
    def head_width(self) -> int:
        """Features of each of the decoder's heads, which its cache holds."""
        return self.width // self.decoder.heads

    @property
    def depth(self) -> int:
        """All blocks, those of the encoder and those of the decoder."""
        return self.encoder.depth + self.decoder.depth


ModelConfig = LanguageConfig | EncoderDecoderConfig
"""What a model folder may hold."""
