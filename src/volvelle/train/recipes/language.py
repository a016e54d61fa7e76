"""`volvelle train language data=…`: a language model from scratch."""

from __future__ import annotations

from dataclasses import dataclass, field

from volvelle.errors import UsageError
from volvelle.systems.language import config as c
from volvelle.systems.language.mtp_names import Kind as MTPKind
from volvelle.train.recipes.choices import POSITIONS, AttentionName, PositionName
from volvelle.train.recipes.text import TextOptions


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The size of a Llama-style decoder (RMSNorm, gated MLP, tied embeddings)."""

    width: int = 256
    """Features a token."""
    depth: int = 6
    """Blocks."""
    heads: int = 4
    """Attention heads."""
    kv_heads: int | None = None
    """Key and value heads; None: as many as heads."""
    mlp_width: int | None = None
    """Inner features of the MLP; None: 8/3 of the width, rounded up to a multiple of 32."""
    context: int = 256
    """Tokens the model sees at once."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "kv_heads", "mlp_width", "context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"model.{name}: must be at least 1, got {value}")
        if self.width % (2 * self.heads):
            raise UsageError(f"model.width: must be a multiple of 2 * heads = {2 * self.heads}, got {self.width}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise UsageError(f"model.kv_heads: must divide heads = {self.heads}, got {self.kv_heads}")

    @property
    def inner(self) -> int:
        """The MLP's width, derived where it is not given."""
        return self.mlp_width or -(-self.width * 8 // 3 // 32) * 32


@dataclass(frozen=True, kw_only=True)
class TrainLanguage(TextOptions):
    """Train a small decoder on text, with the tokenizer of a given model or one trained on the data."""

    learning_rate: float = 1e-3
    """Peak learning rate, reached after the warm-up."""
    batch: int = 16
    """Windows in one micro-batch."""
    weight_decay: float = 0.1
    """AdamW's decoupled decay, on matrices only."""
    evaluate_every: int | None = 200
    """Steps between two evaluations; None: at the start and the end."""
    model: ModelShape = field(default_factory=ModelShape)
    """The size of the model: model.width=128."""
    position: PositionName = "rope"
    """How the model knows where a token stands; `volvelle ls techniques` says more about each."""
    attention: AttentionName = "softmax"
    """softmax looks back at every token; linear sums all of them up in a state of fixed size."""
    mtp: int = 1
    """Tokens predicted at each position; those after the next by modules that plain decoding omits."""
    mtp_kind: MTPKind = "sequential"
    """sequential: each is given the token before its own (DeepSeek-V3); parallel: heads side by side (Gloeckle)."""
    mtp_weight: float | None = None
    """λ, the weight of the further tokens' mean loss; None: 0.3 for sequential, mtp - 1 (their sum) for parallel."""
    tokenizer: str | None = None
    """A model whose tokenizer to use; None: byte-level BPE trained on the data."""
    vocabulary: int = 4096
    """Words of a trained tokenizer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary < 257:
            raise UsageError(f"vocabulary: a byte-level tokenizer needs at least 257 words, got {self.vocabulary}")
        if self.mtp < 1:
            raise UsageError(f"mtp: must be at least 1 (the next token only), got {self.mtp}")
        if self.attention == "linear" and isinstance(POSITIONS[self.position], c.ScoreBias):
            raise UsageError(
                f"position={self.position} adds to attention scores, and attention=linear has none",
                tip="take rope, or an encoding that is added to the embeddings",
            )
        window = min(self.length or self.model.context, self.model.context)
        if self.mtp > window:
            raise UsageError(f"mtp: a window of {window} tokens has no position with {self.mtp} tokens to learn")
        if self.mtp_weight is not None and self.mtp_weight <= 0:
            raise UsageError(f"mtp_weight: must be above 0, got {self.mtp_weight}")
