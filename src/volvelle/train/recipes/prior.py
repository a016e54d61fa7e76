"""`volvelle train prior data=…`: a language model that writes the codes of pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from volvelle.errors import UsageError
from volvelle.train.recipes.choices import PositionName
from volvelle.train.recipes.language import ModelShape
from volvelle.train.recipes.pictures import ViewOptions

Condition = Literal["auto", "nothing", "class", "caption"]


@dataclass(frozen=True, kw_only=True)
class TrainPrior(ViewOptions):
    """Train a language model over the codes of an image codec, so that it draws pictures."""

    data: str
    """A folder of pictures, of folders of classes, with captions.jsonl or of IDX files; scenes: drawn ones with
    captions."""
    codec: str | None = None
    """What turns pictures into codes: a run of train vqgan, or a checkpoint that `open_codec` reads; None: the newest
    finished run of train vqgan under runs/."""
    condition: Condition = "auto"
    """What the model is told of a picture before its codes; auto: its caption, else its class, where they are known."""
    most: int | None = None
    """The most pictures that are trained on, at even distances; None: all."""
    held_out_share: float = 0.05
    held_out_size: int | None = 2000
    """The most held-out pictures that evaluations look at; None: all."""
    size: int | None = None
    """Side of the pictures in pixels; None: as the codec was trained."""
    views: int = 1
    """Views of each picture that are encoded; they are made once."""
    dropped: float = 0.1
    """Share of the texts whose class or caption is left out, so that the model also draws without being told."""
    words: int = 1024
    """Words of the captions' tokenizer."""

    model: ModelShape = field(default_factory=lambda: ModelShape(width=160, depth=5, heads=5))
    """The size of the model: model.width=128. Its context is what a picture takes."""
    position: PositionName = "rope"
    """How the model knows where a code stands; pictures of other sizes than trained on want rope."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    epochs: float = 2.0
    """Passes over the codes, used when `steps` is absent."""
    batch: int = 64
    """Pictures in one micro-batch."""
    learning_rate: float = 1e-3
    """Peak learning rate, reached after the warm-up."""
    weight_decay: float = 0.05
    """AdamW's decoupled decay, on matrices only."""
    average: float | None = 0.995
    """Decay of a moving average of the weights, used for evaluation and the result; None: no average."""
    evaluate_every: int | None = 300
    """Steps between two evaluations; None: at the start and the end."""
    samples: int = 32
    """Pictures drawn at every evaluation, for the report."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("most", "views", "words"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}: must be at least 1, got {value}")
        if self.words < 258:
            raise UsageError(f"words: a byte-level tokenizer needs at least 258 words, got {self.words}")
        if not 0 <= self.dropped <= 1:
            raise UsageError(f"dropped: must lie between 0 and 1, got {self.dropped}")
        if self.views > 1 and self.zoom == (1.0, 1.0) and not self.mirror:
            raise UsageError("views: all would be the same", tip="mirror=0.5, or zoom=0.8,1")
        if self.samples < 0:
            raise UsageError(f"samples: must not be negative, got {self.samples}")
