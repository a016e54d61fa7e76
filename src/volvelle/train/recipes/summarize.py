"""`volvelle train summarize`: an encoder-decoder from scratch that learns to answer texts, such as by a summary."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from volvelle.decode.options import Beams
from volvelle.errors import UsageError
from volvelle.train.recipes.text import TextOptions

DOCSTRINGS = "docstrings"
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
"""BART's control tokens, the first four at BART's ids."""


@dataclass(frozen=True, kw_only=True)
class PairShape:
    """The size of a BART: learned positions, norms behind the branches, GELU, tied embeddings."""

    width: int = 192
    """Features a token."""
    depth: int = 3
    """Blocks of the encoder, and as many of the decoder."""
    heads: int = 4
    """Attention heads."""
    mlp_width: int | None = None
    """Inner features of the MLP; None: four times the width."""
    context: int = 256
    """Tokens of the longest source, and of the longest answer."""
    dropout: float = 0.1
    """Share of features dropped while training."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "mlp_width", "context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"model.{name}: must be at least 1, got {value}")
        if self.width % self.heads:
            raise UsageError(f"model.width: must be a multiple of heads = {self.heads}, got {self.width}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"model.dropout: must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class TrainSummarize(TextOptions):
    """Train a small BART on texts and their summaries, with a tokenizer trained on the data."""

    data: str = DOCSTRINGS
    """.jsonl or `text || summary` lines; docstrings: those of the installed Python packages and their first lines."""
    packages: tuple[str, ...] = ()
    """Packages whose docstrings to take; all installed ones when left out."""
    on_bad: Literal["stop", "skip"] = "skip"
    """What to do with lines that are broken, or longer than the context."""
    learning_rate: float = 1e-3
    """Peak learning rate, reached after the warm-up."""
    batch: int = 32
    """Pairs in one micro-batch."""
    weight_decay: float = 0.01
    """AdamW's decoupled decay, on matrices only."""
    evaluate_every: int | None = 200
    """Steps between two evaluations; None: at the start and the end."""
    max_tokens: int = 48
    """The longest answer, in tokens."""
    model: PairShape = field(default_factory=PairShape)
    """The size of the model: model.width=128."""
    vocabulary: int = 4096
    """Words of the tokenizer."""
    denoise: float = 0.0
    """Gapped texts to be written out whole, for each pair: what BART is pretrained by, and learns to copy from."""
    beams: Beams = field(default_factory=Beams)
    """How answers are searched for when they are scored; beams.width=1 takes the likeliest token each time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary < 256 + len(SPECIAL):
            least = 256 + len(SPECIAL)
            raise UsageError(f"vocabulary: a byte-level tokenizer needs at least {least} words, got {self.vocabulary}")
        if not 0 <= self.denoise < math.inf:
            raise UsageError(f"denoise: the texts for each pair, 0 or more, got {self.denoise}")
        if self.packages and self.data != DOCSTRINGS:
            raise UsageError(f"packages: are for data={DOCSTRINGS}, not for {self.data}")
        if self.max_tokens >= self.model.context:
            raise UsageError(f"max_tokens: must be below model.context = {self.model.context}, got {self.max_tokens}")
