"""`volvelle train prior data=…`: a language model that writes the codes of pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from volvelle.errors import UsageError
from volvelle.train.options import FitOptions
from volvelle.train.recipes.choices import PositionName
from volvelle.train.recipes.language import ModelShape

Condition = Literal["auto", "nothing", "class", "caption"]


@dataclass(frozen=True, kw_only=True)
class TrainPrior(FitOptions):
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
    held_out: str | None = None
    """A folder of the same kind to measure on; when absent, the val or test part of `data`, or a share of it."""
    held_out_share: float = 0.05
    """The share of the pictures set aside where there is nothing else to measure on."""
    held_out_size: int | None = 2000
    """The most held-out pictures that evaluations look at; None: all."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do with files that cannot be read."""

    size: int | None = None
    """Side of the pictures in pixels; None: as the codec was trained."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Least and largest side of a view, as a share of the picture's shorter side; below 1, views are crops."""
    mirror: float = 0.0
    """Share of mirrored views."""
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
    device: str | None = None
    """Where to train: cpu, cuda, cuda:1; None: a CUDA device when there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("most", "held_out_size", "size", "views", "words"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}: must be at least 1, got {value}")
        if not 0 < self.held_out_share < 1:
            raise UsageError(f"held_out_share: must lie between 0 and 1, got {self.held_out_share}")
        if self.words < 258:
            raise UsageError(f"words: a byte-level tokenizer needs at least 258 words, got {self.words}")
        for name in ("mirror", "dropped"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}: must lie between 0 and 1, got {getattr(self, name)}")
        if len(self.zoom) != 2 or not 0 < self.zoom[0] <= self.zoom[1] <= 1:
            raise UsageError(f"zoom: wanted least,largest above 0 and up to 1, got {self.zoom}")
        if self.views > 1 and self.zoom == (1.0, 1.0) and not self.mirror:
            raise UsageError("views: all would be the same", tip="mirror=0.5, or zoom=0.8,1")
        if self.samples < 0:
            raise UsageError(f"samples: must not be negative, got {self.samples}")
