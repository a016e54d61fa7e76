"""`volvelle adapt MODEL data=…`: a model that exists, fitted to your text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from volvelle.adapt.methods import Bottleneck, DoRA, Full, LoRA, Method
from volvelle.adapt.prefix_methods import PrefixTuning, PromptTuning
from volvelle.train.recipes.text import TextOptions

MethodName = Literal["lora", "dora", "adapter", "prefix", "prompt", "full"]


@dataclass(frozen=True, kw_only=True)
class MethodOptions(TextOptions):
    """The model, and every method's own options."""

    model: str
    """A known model, a Hugging Face repo id, a folder, or a run."""
    lora: LoRA = field(default_factory=LoRA)
    """LoRA's own options: lora.rank=16."""
    dora: DoRA = field(default_factory=DoRA)
    """DoRA's: dora.rank=16."""
    adapter: Bottleneck = field(default_factory=Bottleneck)
    """Those of bottleneck adapters: adapter.form=pfeiffer."""
    prefix: PrefixTuning = field(default_factory=PrefixTuning)
    """Those of prefix tuning: prefix.length=20."""
    prompt_tuning: PromptTuning = field(default_factory=PromptTuning)
    """Those of prompt tuning: prompt_tuning.length=50."""
    checkpoint_every: int | None = 50
    """Steps between two checkpoints; None: only at the end or when interrupted."""

    def named(self, name: MethodName) -> Method:
        """A method with its options."""
        methods: dict[MethodName, Method] = {
            "lora": self.lora,
            "dora": self.dora,
            "adapter": self.adapter,
            "prefix": self.prefix,
            "prompt": self.prompt_tuning,
            "full": Full(),
        }
        return methods[name]


@dataclass(frozen=True, kw_only=True)
class AdaptLanguage(MethodOptions):
    """Adapt a language model to examples or plain text."""

    method: MethodName = "lora"
    """What is trained: additions to some layers (lora, dora, adapter), to the text (prefix, prompt), or full: all."""
    learning_rate: float | None = None  # type: ignore[assignment]
    """Peak learning rate; None: the method's own, 3e-5 for full, 1e-2 for prompt, else 1e-3."""

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", self.adaptation.learning_rate)
        super().__post_init__()

    @property
    def adaptation(self) -> Method:
        """The chosen method with its options."""
        return self.named(self.method)
