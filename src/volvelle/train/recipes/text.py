"""Options that every recipe on text shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from volvelle.errors import UsageError
from volvelle.train.options import FitOptions


@dataclass(frozen=True, kw_only=True)
class TextOptions(FitOptions):
    """Where the text is, how a record becomes an example, and how much of it is held out."""

    data: str
    """.txt (plain, or `prompt || completion` lines) or .jsonl (prompt/completion, messages, text, any fields)."""
    held_out: str | None = None
    """A file of the same kind to measure on; when absent, a share of `data` is set aside."""
    held_out_share: float = 0.05
    """The share of `data` set aside when `held_out` is absent."""
    held_out_size: int = 200
    """The most held-out examples (or windows of text) that evaluations of a run look at."""
    prompt: str | None = None
    """Template of the prompt over a record's fields: "{{ triples }}"."""
    completion: str | None = None
    """Template of the completion; one expression that gives a list means several right answers."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do with lines that are broken, or longer than the context."""
    length: int | None = None
    """Tokens in one sample; None: the model's context."""
    pack: bool = False
    """Put several short examples side by side in one row; each sees only itself."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    samples: int = 16
    """Held-out prompts that the model answers before and after, for the report."""
    max_tokens: int = 64
    """The longest answer, in tokens."""
    device: str | None = None
    """Where to train: cpu, cuda, cuda:1; None: a CUDA device when there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.held_out_share < 1:
            raise UsageError(f"held_out_share: must lie between 0 and 1, got {self.held_out_share}")
        for name in ("held_out_size", "max_tokens", "length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}: must be at least 1, got {value}")
        if self.samples < 0:
            raise UsageError(f"samples: must not be negative, got {self.samples}")
