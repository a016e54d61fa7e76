"""`volvelle train segment data=…`: a segmenter on images with masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from volvelle.errors import UsageError
from volvelle.systems.backbone.config import OutputStride
from volvelle.systems.backbone.names import find_config
from volvelle.systems.segmentation import config as c
from volvelle.train.options import FitOptions

SCENES = "scenes"
HeadName = Literal["gcn", "aspp", "context", "fcn", "unet"]
Weighting = Literal["none", "log", "inverse"]


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """Which decoder, and its size; what a decoder does not have is left alone."""

    head: HeadName = "gcn"
    """gcn: large kernels; aspp: DeepLab's pyramid of rates; context: Dilation8's rates in a row; fcn; unet."""
    kernel: int = 7
    """gcn: k of its k x 1 and 1 x k convolutions."""
    width: int = 48
    """Channels of the decoder; 0: gcn's scores have one a class, as in its paper."""
    detail: int = 24
    """gcn: channels of a branch at stride 2, for what is thin; 0: none, as in its paper."""

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.width < 0 or self.detail < 0 or (self.width == 0 and self.head != "gcn"):
            raise UsageError(
                "model: kernel and width must be at least 1 and detail not negative, "
                f"got kernel={self.kernel}, width={self.width}, detail={self.detail}"
            )

    def build(self) -> c.Head:
        """The configuration that the words describe."""
        if self.head == "gcn":
            return c.GCN(kernel=self.kernel, width=self.width or None, detail=self.detail)
        if self.head == "aspp":
            return c.ASPP(width=self.width, low=min(48, self.width))
        if self.head == "unet":
            return c.UNet(width=self.width)
        return c.Context() if self.head == "context" else c.FCN()


@dataclass(frozen=True, kw_only=True)
class LookOptions:
    """How pictures are looked at when the finished network is measured."""

    scales: tuple[float, ...] = (1.0,)
    """Magnifications whose probabilities are averaged: looks.scales=0.75,1,1.5."""
    mirror: bool = False
    """Look at the mirror image too."""
    window: tuple[int, int] = (0, 0)
    """Height and width of windows that slide over larger pictures; 0,0: the whole picture at once."""

    @property
    def many(self) -> bool:
        """Whether this is more than one plain look."""
        return self.mirror or self.scales != (1.0,) or self.window != (0, 0)


@dataclass(frozen=True, kw_only=True)
class TrainSegment(FitOptions):
    """Train a segmenter on images with masks, choose its best moment on a part of them, and measure it on others."""

    unsharded: ClassVar[str] = "segmenters, of which the best moment is kept whole"

    data: str = SCENES
    """A folder of images and masks (docs/segmentation.md: layouts), or scenes: garments on drawn backgrounds."""
    held_out: str | None = None
    """A folder to measure the result on; when absent, the val part of `data`, or a share of it."""
    selection_share: float = 0.06
    """The share of the training images on which the best moment is chosen."""
    classes: tuple[str, ...] = ()
    """Names of the classes, in order; when absent, those of classes.txt, of the layout, or numbers."""
    void: tuple[int, ...] = ()
    """Ids in the masks that are nothing to learn, beside 255."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do with files that cannot be read or do not fit each other."""

    backbone: str = "efficientnet-lite0"
    """The encoder: any of `volvelle ls models`' image backbones, resnet-50, mobilenet-v2, …"""
    weights: str = "imagenet"
    """What the encoder begins with: imagenet, a file or folder, or none."""
    output_stride: OutputStride = 32
    """Stride of the encoder's last map; 16 or 8 dilate the last stages."""
    model: DecoderOptions = field(default_factory=DecoderOptions)
    """The decoder: model.head=aspp model.width=128."""

    crop: tuple[int, int] = (288, 384)
    """Height and width of training crops; 0,0: as large as the first image."""
    scale: tuple[float, float] = (0.75, 1.75)
    """Least and largest magnification of a crop."""
    mirror: float = 0.5
    """Share of mirrored crops."""
    colour: float = 0.3
    """Brightness, contrast and saturation are multiplied by 1 ± this."""
    small: float = 0.0
    """The share of all steps, from the first, that sees crops shrunk by `shrink`: cheaper, and coarse things first."""
    shrink: float = 0.667
    """How much smaller the crops of these steps are."""

    weighting: Weighting = "log"
    """Weights of classes in the loss, by their share f of the pixels: log: 1 / log(1.1 + f); inverse: 1 / f; none."""
    lovasz: float = 1.0
    """Weight of the Lovász-softmax loss, which follows the mean IoU, beside cross-entropy; 0: none."""
    encoder_rate: float = 0.2
    """The encoder's learning rate as a share of the decoder's."""

    steps: int | None = None
    """Optimiser steps; when absent, `epochs` decides."""
    epochs: float = 40.0
    """Passes over the data, used when `steps` is absent."""
    batch: int = 8
    """Crops in one micro-batch."""
    learning_rate: float = 1.5e-3
    """Peak learning rate of the decoder, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "constant", "poly"] = "poly"
    """Shape of the learning rate after the warm-up; poly falls as (1 - t)^0.9."""
    weight_decay: float = 0.01
    """AdamW's decoupled decay, on matrices only."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """bf16 and fp16 run the forward pass under autocast over fp32 weights; fp16 scales the loss."""
    average: float | None = 0.995
    """Decay of a moving average of the weights, used for evaluation and the result; None: no average."""
    evaluate_every: int | None = 200
    """Steps between two evaluations; None: at the start and the end."""

    looks: LookOptions = field(default_factory=LookOptions)
    """More looks at each picture of the last measurement: looks.scales=0.75,1,1.5 looks.mirror=true."""
    samples: int = 6
    """Pictures in the report, and as many of the worst."""
    device: str | None = None
    """Where to train: cpu, cuda, cuda:1; None: a CUDA device when there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        find_config(self.backbone)
        if not 0 < self.selection_share < 1:
            raise UsageError(f"selection_share: must lie between 0 and 1, got {self.selection_share}")
        if len(self.crop) != 2 or (min(self.crop) < 32 and tuple(self.crop) != (0, 0)):
            raise UsageError(f"crop: wanted height,width of 32 pixels or more, got {self.crop}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise UsageError(f"scale: wanted least,largest above 0, got {self.scale}")
        for name, low, high in (("mirror", 0, 1), ("colour", 0, 0.99), ("small", 0, 1), ("shrink", 0.1, 1)):
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name}: must lie between {low} and {high}, got {getattr(self, name)}")
        if self.lovasz < 0 or self.encoder_rate < 0 or self.samples < 0:
            raise UsageError("lovasz, encoder_rate and samples: must not be negative")
        if self.batch == 1 and max(self.crop) <= self.output_stride:
            # Batch normalisation of one value a channel has no variance.
            raise UsageError("batch: one crop with a last map of one pixel cannot be normalised; take batch=2")
