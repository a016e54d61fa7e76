"""Compound scaling: Tan & Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks".

A network is made φ times "larger" in three directions at once (equation 3):

    depth d = α^φ,  width w = β^φ,  resolution r = γ^φ,   α = 1.2, β = 1.1, γ = 1.15,  α β² γ² ≈ 2

so that its FLOPs, which go with d w² r², grow by about 2^φ. Channels are rounded to multiples of 8, never by more than
a tenth down; repeats are rounded up. Every network of the family, published or of one's own φ, comes out of `scale`.

The released networks round: B0 to B3 lie at φ = 0, 1/2, 1, 2, and from B4 on the released coefficients run ahead of the
rule (B7: 2.0 wide, 3.1 deep and 600 pixels, where φ = 6 gives 1.8, 3.0 and 518). `PUBLISHED` holds them as released.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from volvelle.data.images_prepare import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from volvelle.systems.backbone.config import MobileConfig, MobileStage, Norm

ALPHA, BETA, GAMMA = 1.2, 1.1, 1.15


@dataclass(frozen=True)
class Scaling:
    """Factors of width and depth, the side of the input in pixels, and the dropout before the classifier."""

    width: float
    depth: float
    resolution: int
    dropout: float = 0.2

    @property
    def cost(self) -> float:
        """FLOPs relative to the unscaled network at 224 pixels, before any rounding: d w² (r / 224)²."""
        return self.depth * self.width**2 * (self.resolution / 224) ** 2


def compound(phi: float, *, base: int = 224) -> Scaling:
    """The paper's rule for any φ; the resolution is rounded to an even number of pixels.

    >>> compound(1)
    Scaling(width=1.1, depth=1.2, resolution=258, dropout=0.2)
    """
    return Scaling(BETA**phi, ALPHA**phi, 2 * round(base * GAMMA**phi / 2))


PUBLISHED: dict[str, Scaling] = {
    "b0": Scaling(1.0, 1.0, 224, 0.2),
    "b1": Scaling(1.0, 1.1, 240, 0.2),
    "b2": Scaling(1.1, 1.2, 260, 0.3),
    "b3": Scaling(1.2, 1.4, 300, 0.3),
    "b4": Scaling(1.4, 1.8, 380, 0.4),
    "b5": Scaling(1.6, 2.2, 456, 0.4),
    "b6": Scaling(1.8, 2.6, 528, 0.5),
    "b7": Scaling(2.0, 3.1, 600, 0.5),
}
LITE: dict[str, Scaling] = {
    "lite0": Scaling(1.0, 1.0, 224, 0.2),
    "lite1": Scaling(1.0, 1.1, 240, 0.2),
    "lite2": Scaling(1.1, 1.2, 260, 0.3),
    "lite3": Scaling(1.2, 1.4, 280, 0.3),
    "lite4": Scaling(1.4, 1.8, 300, 0.3),
}

B0 = MobileConfig(
    name="efficientnet-b0",
    stages=(
        MobileStage(3, 1, 1, 16, 1, 0.25),
        MobileStage(3, 2, 6, 24, 2, 0.25),
        MobileStage(5, 2, 6, 40, 2, 0.25),
        MobileStage(3, 2, 6, 80, 3, 0.25),
        MobileStage(5, 1, 6, 112, 3, 0.25),
        MobileStage(5, 2, 6, 192, 4, 0.25),
        MobileStage(3, 1, 6, 320, 1, 0.25),
    ),
    activation="silu",
    drop_path=0.2,
    dropout=0.2,
)
"""The network that the paper scales (table 1)."""


def round_channels(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, at least one, and at least 0.9 of what was asked for.

    >>> round_channels(19.2), round_channels(11.9), round_channels(3.0)
    (24, 16, 8)
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def scale(base: MobileConfig, scaling: Scaling, *, fixed_ends: bool = False) -> MobileConfig:
    """The network `base`, wider, deeper and for larger pictures.

    With `fixed_ends` (the Lite family) stem and head keep their channels, and the first and last stage their repeats.
    """
    last = len(base.stages) - 1

    def stage(index: int, of: MobileStage) -> MobileStage:
        keeps = fixed_ends and index in (0, last)
        repeats = of.repeats if keeps else math.ceil(scaling.depth * of.repeats)
        return replace(of, channels=round_channels(scaling.width * of.channels), repeats=repeats)

    size = scaling.resolution
    return replace(
        base,
        stages=tuple(stage(index, of) for index, of in enumerate(base.stages)),
        stem=base.stem if fixed_ends else round_channels(scaling.width * base.stem),
        head=base.head if fixed_ends else round_channels(scaling.width * base.head),
        dropout=scaling.dropout,
        preprocessing=replace(base.preprocessing, size=size, crop=size / (size + 32)),
    )


def efficientnet_config(variant: str) -> MobileConfig:
    """EfficientNet B0 to B7 ("b0"), as PyTorch trains them, or as released from TensorFlow ("tf-b0").

    >>> [stage.channels for stage in efficientnet_config("b4").stages]
    [24, 32, 56, 112, 160, 272, 448]
    """
    plain = variant.removeprefix("tf-")
    base = replace(B0, preprocessing=Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD))
    config = scale(base, PUBLISHED[plain])
    if plain == variant:
        return replace(config, name=f"efficientnet-{plain}", timm=f"efficientnet_{plain}")
    return replace(from_tensorflow(config), name=f"tf-efficientnet-{plain}", timm=f"tf_efficientnet_{plain}")


def lite_config(variant: str) -> MobileConfig:
    """EfficientNet Lite0 to Lite4 ("lite0"), as released: no squeeze and excitation, ReLU6, ends that do not scale.

    >>> lite_config("lite4").head, [stage.repeats for stage in lite_config("lite4").stages]
    (1280, [1, 4, 4, 6, 6, 8, 1])
    """
    plain = tuple(replace(stage, squeeze=0.0) for stage in B0.stages)
    base = replace(B0, stages=plain, activation="relu6")
    config = from_tensorflow(scale(base, LITE[variant], fixed_ends=True))
    half = (0.5, 0.5, 0.5)
    pictures = replace(config.preprocessing, mean=half, std=half)
    return replace(config, preprocessing=pictures, name=f"efficientnet-{variant}", timm=f"tf_efficientnet_{variant}")


def from_tensorflow(config: MobileConfig) -> MobileConfig:
    """The same network with the padding and norms of weights that were trained in TensorFlow."""
    return replace(config, padding="same", norm=Norm(eps=1e-3, momentum=0.01))
