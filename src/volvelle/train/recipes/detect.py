"""`volvelle train detect data=…`: a detector on pictures with boxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from volvelle.errors import UsageError
from volvelle.systems.detection.config import ThunderNet
from volvelle.systems.detection.names import named
from volvelle.train.options import FitOptions
from volvelle.train.recipes.segment import SCENES


@dataclass(frozen=True, kw_only=True)
class TrainDetect(FitOptions):
    """Train a detector on pictures with boxes, watch it on a part of them, and measure it on others."""

    unsharded: ClassVar[str] = "detectors, of which the best moment is kept whole"

    data: str = SCENES
    """A folder (VOC's XML, COCO's JSON: docs/detection.md), a JSON file, or scenes: garments on drawn backgrounds."""
    held_out: str | None = None
    """A folder or file to measure the result on; when absent, the val part of `data`, or a share of it."""
    selection_share: float = 0.05
    """The share of the training pictures on which the run is watched, and the scores to be trusted are chosen."""
    keep: Literal["last", "best"] = "last"
    """The weights that are kept: the last ones, or those of the best moment on the pictures set aside."""
    classes: tuple[str, ...] = ()
    """Names of the classes, in order; when absent, those of the files."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do with pictures that cannot be read or do not fit their annotation."""

    model: str = "thundernet-snet49"
    """A composition and a backbone: thundernet-snet146, thundernet-efficientnet-lite0, rfcn-resnet-50, …"""
    weights: str = "none"
    """What the backbone begins with: none, imagenet (efficientnet-lite0), a file or folder. Or what the whole detector
    begins with: a run of this recipe, with other classes too.
    """
    stride: Literal[8, 16] = 16
    """Pixels from one place to the next on the map where ThunderNet proposes and pools; 8 where objects are small."""
    deformable: int = 0
    """How many of the backbone's last 3 x 3 convolutions are deformable; position-sensitive pooling is then too."""
    size: int = 320
    """Pixels that pictures are brought to."""
    stretch: bool = True
    """Pictures become squares of `size`; false: their longer side becomes `size`."""
    anchors: int = 11
    """Shapes of anchors that are clustered from the boxes; 0: the model's own."""

    crop: tuple[float, float] = (0.6, 1.25)
    """Least and largest share of a picture's sides that a training view shows; above 1 it lies on a grey ground."""
    mirror: float = 0.5
    """Share of views that are mirrored."""
    upside_down: float = 0.5
    """Share of views that stand on their head; 0 where up is up (streets, rooms)."""
    colour: float = 0.2
    """Brightness, contrast and saturation are multiplied by 1 ± this."""
    multi_scale: tuple[float, ...] = (1.0,)
    """Magnifications of whole batches, one drawn at each step: multi_scale=0.75,1,1.25."""

    backbone_rate: float = 1.0
    """The backbone's learning rate as a share of the others'; 0.3 where it begins with ImageNet's weights."""
    steps: int | None = None
    """Optimiser steps; when absent, `epochs` decides."""
    epochs: float = 120.0
    """Passes over the data, used when `steps` is absent."""
    batch: int = 8
    """Pictures in one micro-batch."""
    learning_rate: float = 1.5e-3
    """Peak learning rate, reached after the warm-up."""
    warmup: float = 60.0
    """Warm-up: a share of all steps when below 1, else a number of steps."""
    weight_decay: float = 0.02
    """AdamW's decoupled decay, on matrices only."""
    clip: float | None = 10.0
    """Largest gradient norm; None leaves gradients as they are."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """bf16 and fp16 run the forward pass under autocast over fp32 weights; fp16 scales the loss."""
    average: float | None = 0.998
    """Decay of a moving average of the weights, used for evaluation and the result; None: no average."""
    evaluate_every: int | None = 200
    """Steps between two evaluations; None: at the start and the end."""

    samples: int = 6
    """Pictures in the report, and as many of the worst."""
    device: str | None = None
    """Where to train: cpu, cuda, cuda:1; None: a CUDA device when there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        composition = named(self.model).composition
        if self.stride != 16 and not isinstance(composition, ThunderNet):
            raise UsageError(f"stride={self.stride}: {self.model} has stride 16 alone", tip="model=thundernet-snet49")
        if not 0 <= self.selection_share < 1:
            raise UsageError(f"selection_share: must lie in [0, 1), got {self.selection_share}")
        if self.keep == "best" and self.selection_share == 0:
            raise UsageError("keep=best: needs pictures to choose by", tip="selection_share=0.05")
        if len(self.crop) != 2 or not 0 < self.crop[0] <= self.crop[1]:
            raise UsageError(f"crop: wanted least,largest above 0, got {self.crop}")
        for name, high in (("mirror", 1), ("upside_down", 1), ("colour", 0.99)):
            if not 0 <= getattr(self, name) <= high:
                raise UsageError(f"{name}: must lie between 0 and {high}, got {getattr(self, name)}")
        if not self.multi_scale or min(self.multi_scale) <= 0:
            raise UsageError(f"multi_scale: magnifications above 0 are wanted, got {self.multi_scale}")
        if self.size < 32 or self.size * min(self.multi_scale) < 32:
            raise UsageError(f"size: must be at least 32 pixels at every magnification, got {self.size}")
        if min(self.anchors, self.deformable, self.samples, self.backbone_rate) < 0:
            raise UsageError("anchors, deformable, samples and backbone_rate: must not be negative")
