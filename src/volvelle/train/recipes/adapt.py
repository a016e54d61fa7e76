"""`volvelle adapt MODEL data=…`: a model that exists, fitted to your text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from volvelle.adapt.methods import LoRA
from volvelle.train.recipes.text import TextOptions


@dataclass(frozen=True, kw_only=True)
class AdaptLanguage(TextOptions):
    """Adapt a language model to examples or plain text."""

    model: str
    """A known model, a Hugging Face repo id, a folder, or a run."""
    method: Literal["lora", "full"] = "lora"
    """lora trains a low-rank addition to some layers, full trains every weight."""
    lora: LoRA = field(default_factory=LoRA)
    """LoRA's own options: lora.rank=16."""
    learning_rate: float | None = None  # type: ignore[assignment]
    """Peak learning rate; None: 1e-3 for lora, 3e-5 for full."""
    checkpoint_every: int | None = 50
    """Steps between two checkpoints; None: only at the end or when interrupted."""

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            # Low-rank matrices start at zero and take far larger steps than trained weights bear.
            object.__setattr__(self, "learning_rate", 1e-3 if self.method == "lora" else 3e-5)
        super().__post_init__()
