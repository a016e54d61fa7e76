"""`volvelle draft MODEL data=…`: a drafter for a model, trained on your text or on the model's own answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from volvelle.adapt.methods import LoRA
from volvelle.errors import UsageError
from volvelle.systems.language.mtp_names import Kind as MTPKind
from volvelle.train.recipes.language import ModelShape
from volvelle.train.recipes.text import TextOptions

DraftKind = Literal["medusa", "mtp", "small", "ngram"]
PROMPTS, MANY = "prompts", 2000
"""What data= says for prompts that are made here, and how many they are where the recipe does not say."""


@dataclass(frozen=True)
class MedusaOptions:
    """Medusa's heads (Cai et al. 2024), and whether the model is trained with them."""

    heads: int = 4
    """K: the tokens predicted beyond the next one."""
    layers: int = 1
    """Residual blocks of a head."""
    projection: Literal["tied", "own"] = "tied"
    """tied: heads use the model's own vocabulary projection; own: each trains a copy (28M parameters at width 576)."""
    decay: float = 0.8
    """The k-th head's loss weighs decay ** k."""
    backbone: Literal["frozen", "lora"] = "frozen"
    """frozen: the heads alone are trained (Medusa-1); lora: the model too, by an adapter (Medusa-2)."""
    weight: float = 0.2
    """λ_0: the weight of the heads' loss beside the model's own, with backbone=lora."""
    rate: float = 0.25
    """The adapter's learning rate over the heads'."""
    warmup: float = 0.3
    """The share of the steps in which the heads are trained alone, with backbone=lora."""

    def __post_init__(self) -> None:
        for name in ("heads", "layers"):
            if getattr(self, name) < 1:
                raise UsageError(f"medusa.{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("decay", "weight", "rate"):
            if getattr(self, name) <= 0:
                raise UsageError(f"medusa.{name}: must be above 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"medusa.warmup: must be in [0, 1), got {self.warmup}")


@dataclass(frozen=True)
class MTPOptions:
    """Modules of multi-token prediction on a model that is not trained."""

    kind: MTPKind = "sequential"
    """sequential: each is given the token before its own (DeepSeek-V3); parallel: heads side by side (Gloeckle)."""
    depths: int | None = None
    """Modules; None: 1 sequential one, which drafts with itself, or 3 parallel ones."""
    decay: float = 1.0
    """The k-th module's loss weighs decay ** k."""

    def __post_init__(self) -> None:
        if self.depths is not None and self.depths < 1:
            raise UsageError(f"mtp.depths: must be at least 1, got {self.depths}")
        if self.decay <= 0:
            raise UsageError(f"mtp.decay: must be above 0, got {self.decay}")

    @property
    def count(self) -> int:
        """The number of modules."""
        return self.depths or (1 if self.kind == "sequential" else 3)


@dataclass(frozen=True, kw_only=True)
class TrainDraft(TextOptions):
    """Train what drafts for a language model, so that it decodes several tokens in a step."""

    model: str
    """The model to draft for: a known model, a Hugging Face repo id, a folder, or a run."""
    data: str
    """.txt or .jsonl, as volvelle adapt takes it; prompts, with distill: made from installed packages and countries."""
    kind: DraftKind = "medusa"
    """medusa: heads on the final state; mtp: a module with a block of its own; small: a smaller model; ngram: counts of
    what followed the last tokens, which take no training."""
    learning_rate: float = 1e-3
    """Peak learning rate, reached after the warm-up."""
    distill: bool = False
    """Learn the model's own greedy answers to the prompts in the data, which it is to draft for. They are generated
    first, and kept in the run folder."""
    examples: int | None = None
    """The most examples that are used, at even distances; None: all."""
    vocabulary: int | None = None
    """Draft only this many of the tokens, the most frequent in the data; None: all. Drafting then costs less."""
    max_tokens: int = 128
    """The longest answer, in tokens."""
    medusa: MedusaOptions = field(default_factory=MedusaOptions)
    """Those of kind=medusa: medusa.heads=5."""
    lora: LoRA = field(default_factory=LoRA)
    """The adapter of medusa.backbone=lora: lora.rank=16."""
    mtp: MTPOptions = field(default_factory=MTPOptions)
    """Those of kind=mtp: mtp.kind=parallel."""
    small: ModelShape = field(default_factory=lambda: ModelShape(width=128, depth=2, heads=2))
    """The size of kind=small: small.width=192. Its context is the model's."""
    k: int = 4
    """Tokens of a draft (nodes of a tree for medusa and ngram: 4 k) when the accepted length is measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("examples", "vocabulary", "k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}: must be at least 1, got {value}")
        if self.kind in ("small", "ngram") and self.vocabulary is not None:
            what = "a smaller model drafts" if self.kind == "small" else "n-grams draft"
            raise UsageError(f"vocabulary: {what} all tokens", tip="kind=medusa or kind=mtp")
        if self.data == PROMPTS and not self.distill:
            raise UsageError(f"data={PROMPTS}: are prompts only, and the answers are the model's", tip="distill=true")
        if self.ranks > 1:
            raise UsageError("ranks: a drafter is trained by one process", tip="leave ranks out")
