"""`volvelle train promptable data=…`: Segment Anything on pictures with masks of objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from volvelle.errors import UsageError
from volvelle.systems.segmentation.sam.config import STRIDE, Light, find_config
from volvelle.train.options import FitOptions
from volvelle.train.recipes.segment import SCENES


@dataclass(frozen=True, kw_only=True)
class TrainPromptable(FitOptions):
    """Train Segment Anything by simulated clicks and boxes, choose its best moment by the IoU after one click."""

    unsharded: ClassVar[str] = "promptable models, whose prompts use single weights"

    data: str = SCENES
    """A folder of images with masks (PNG, COCO's or SA-1B's JSON: docs/sam.md), a JSON file, or scenes of garments."""
    held_out: str | None = None
    """A folder to measure the result on; when absent, the val part of `data`, or a share of it."""
    selection_share: float = 0.06
    """The share of the training pictures on which the best moment is chosen."""
    numbers: Literal["classes", "objects"] = "classes"
    """What a PNG's numbers are: classes, whose connected pieces are the objects, or objects themselves."""
    least: int = 400
    """The fewest pixels of an object."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do with files that cannot be read or do not fit each other."""

    model: str = "lite0"
    """lite0 (EfficientNet-Lite0), lite0_fine (with finer maps: docs/sam.md), vit_b, vit_l or vit_h."""
    weights: str = "imagenet"
    """What it begins with: imagenet (lite0's encoder), a run, file or folder of Segment Anything's, or none."""
    size: int = 512
    """Pixels of the model's square input: a picture's longer side becomes as long."""

    crop: tuple[int, int] = (384, 384)
    """Height and width of training crops of the input; 0,0: all of it."""
    scale: tuple[float, float] = (0.75, 1.75)
    """Least and largest magnification of a crop, beside how the model sees the whole picture."""
    mirror: float = 0.5
    """Share of mirrored crops."""
    colour: float = 0.3
    """Brightness, contrast and saturation are multiplied by 1 ± this."""

    prompts: int = 8
    """Objects that are asked for in each crop, by one click or one box."""
    boxes: float = 0.2
    """Share of steps that begin with boxes instead of clicks."""
    central: float = 0.5
    """Share of simulated clicks in the middle of the object or the error; the others lie anywhere in it."""
    refined: int = 4
    """Of these objects, how many get further clicks, where the answer was wrong; 0: none."""
    rounds: int = 4
    """The most further clicks; each step draws how many, from 1 on."""
    focal: float = 20.0
    """Weight of the focal loss beside dice; less of it makes bolder masks of what the model is unsure of."""
    others: float = 0.0
    """Of the loss of three masks, the share that all bear; the best one bears the rest, and all of it in the paper."""
    classes_weight: float = 0.0
    """Weight of a loss by which the encoder's finest map names the class of each cell, where pixels have one."""

    encoder_rate: float = 0.3
    """The backbone's learning rate as a share of the others'."""
    steps: int | None = None
    """Optimiser steps; when absent, `epochs` decides."""
    epochs: float = 30.0
    """Passes over the data, used when `steps` is absent."""
    batch: int = 6
    """Crops in one micro-batch."""
    learning_rate: float = 8e-4
    """Peak learning rate, reached after the warm-up."""
    weight_decay: float = 0.01
    """AdamW's decoupled decay, on matrices only."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """bf16 and fp16 run the forward pass under autocast over fp32 weights; fp16 scales the loss."""
    average: float | None = 0.995
    """Decay of a moving average of the weights, used for evaluation and the result; None: no average."""
    evaluate_every: int | None = 250
    """Steps between two evaluations; None: at the start and the end."""

    clicks: tuple[int, ...] = (1, 2, 3, 5)
    """Numbers of clicks after which the result is measured."""
    samples: int = 6
    """Pictures in the report, and as many of the worst."""
    device: str | None = None
    """Where to train: cpu, cuda, cuda:1; None: a CUDA device when there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        config = find_config(self.model, self.size)
        if not 0 < self.selection_share < 1:
            raise UsageError(f"selection_share: must lie between 0 and 1, got {self.selection_share}")
        if len(self.crop) != 2 or any(side % STRIDE or not 0 <= side <= self.size for side in self.crop):
            raise UsageError(
                f"crop: height,width up to {self.size}, multiples of {STRIDE}, are wanted, got {self.crop}"
            )
        if min(self.crop) == 0 < max(self.crop):
            raise UsageError(f"crop: both sides or none, got {self.crop}")
        if not isinstance(config.encoder, Light) and self.crop_size != (self.size, self.size):
            raise UsageError(f"crop: {self.model} takes only whole inputs", tip="crop=0,0")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise UsageError(f"scale: wanted least,largest above 0, got {self.scale}")
        for name, high in (("mirror", 1), ("boxes", 1), ("central", 1), ("others", 1), ("colour", 0.99)):
            if not 0 <= getattr(self, name) <= high:
                raise UsageError(f"{name}: must lie between 0 and {high}, got {getattr(self, name)}")
        if min(self.prompts, self.least, self.rounds) < 1 or not 0 <= self.refined <= self.prompts:
            raise UsageError("prompts, least and rounds: at least 1 is wanted, and refined from 0 to prompts")
        weights = self.focal, self.classes_weight, self.encoder_rate
        if not self.clicks or min(self.clicks) < 1 or min(*weights, self.samples) < 0:
            raise UsageError("clicks: 1 or more are wanted; focal, classes_weight, encoder_rate, samples: from 0 on")

    @property
    def crop_size(self) -> tuple[int, int]:
        """Height and width of training crops."""
        return (self.crop[0], self.crop[1]) if max(self.crop) else (self.size, self.size)
