"""`volvelle adapt MODEL data=…`: a model that exists, fitted to your text."""

from __future__ import annotations

from dataclasses import dataclass

from volvelle.adapt.choices import MethodName, Methods
from volvelle.adapt.methods import Method
from volvelle.train.recipes.text import TextOptions


@dataclass(frozen=True, kw_only=True)
class MethodOptions(Methods, TextOptions):
    """The model, and every method's own options."""

    model: str
    """A known model, a Hugging Face repo id, a folder, or a run."""
    checkpoint_every: int | None = 50
    """Steps between two checkpoints; None: only at the end or when interrupted."""


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
