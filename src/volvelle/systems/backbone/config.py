"""Configurations of image classifiers, as frozen data without torch: an inverted-residual net, a ResNet, and so on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from volvelle.data.images_prepare import Preprocessing

OutputStride = Literal[8, 16, 32]
STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every backbone has: its name, the facts of its input, and how its head ends.

    `timm` is the name of the same network in timm, "" where timm has none. `classes` counts the outputs.
    """

    name: str
    timm: str = ""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    classes: int = 1000
    dropout: float = 0.0


@dataclass(frozen=True)
class Norm:
    """Batch normalisation: what is added to the variance, and the share of a new batch in the running statistics."""

    eps: float = 1e-5
    momentum: float = 0.1


@dataclass(frozen=True)
class MobileStage:
    """A stage of inverted residuals; the first has the stride. SE's bottleneck is `squeeze` of a block's input."""

    kernel: int
    stride: int
    expansion: int
    channels: int
    repeats: int
    squeeze: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MobileConfig(Config):
    """MobileNetV2 and EfficientNet: a strided stem, stages of inverted residuals, a wide 1 x 1 head.

    `padding` is "same" where the weights come from TensorFlow. `drop_path` is the last block's share of dropped
    branches; earlier blocks have theirs in proportion to their depth.
    """

    stages: tuple[MobileStage, ...]
    stem: int = 32
    head: int = 1280
    activation: Literal["relu6", "silu"] = "relu6"
    padding: Literal["symmetric", "same"] = "symmetric"
    norm: Norm = field(default_factory=Norm)
    drop_path: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(Config):
    """ResNet: `depths` blocks in four stages; bottleneck blocks (1 x 1, 3 x 3, 1 x 1) give four times their width."""

    depths: tuple[int, int, int, int]
    bottleneck: bool


@dataclass(frozen=True, kw_only=True)
class ShuffleConfig(Config):
    """ShuffleNetV2 and ThunderNet's SNets: a strided stem and a pooling, three stages, a 1 x 1 head (0: none)."""

    stem: int
    channels: tuple[int, int, int]
    head: int
    kernel: int = 3
    depths: tuple[int, int, int] = (4, 8, 4)


@dataclass(frozen=True, kw_only=True)
class InceptionConfig(Config):
    """Inception v1 (GoogLeNet) with batch normalisation, without the two further classifiers of its training."""

    wide_kernel: Literal[3, 5] = 3
    """The kernel of the widest branch: the paper's 5, or 3 as in the released PyTorch weights."""


AnyConfig = MobileConfig | ResNetConfig | ShuffleConfig | InceptionConfig
