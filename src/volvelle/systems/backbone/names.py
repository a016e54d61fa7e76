"""Every backbone by name, as configurations: what `backbone(name)` builds. No torch."""

from __future__ import annotations

from volvelle.data.images_prepare import Preprocessing
from volvelle.errors import UsageError, did_you_mean
from volvelle.systems.backbone.config import (
    AnyConfig,
    InceptionConfig,
    MobileConfig,
    MobileStage,
    ResNetConfig,
    ShuffleConfig,
)
from volvelle.systems.backbone.scaling import LITE, PUBLISHED, efficientnet_config, lite_config

_BILINEAR = Preprocessing(interpolation="bilinear")

MOBILENET_V2 = MobileConfig(
    name="mobilenet-v2",
    timm="mobilenetv2_100",
    stages=(
        MobileStage(3, 1, 1, 16, 1),
        MobileStage(3, 2, 6, 24, 2),
        MobileStage(3, 2, 6, 32, 3),
        MobileStage(3, 2, 6, 64, 4),
        MobileStage(3, 1, 6, 96, 3),
        MobileStage(3, 2, 6, 160, 3),
        MobileStage(3, 1, 6, 320, 1),
    ),
    dropout=0.2,
    preprocessing=_BILINEAR,
)
"""Sandler et al. 2018, table 2."""


def _resnet(layers: int, depths: tuple[int, int, int, int], *, bottleneck: bool) -> ResNetConfig:
    name, timm = f"resnet-{layers}", f"resnet{layers}"
    return ResNetConfig(name=name, timm=timm, depths=depths, bottleneck=bottleneck, preprocessing=_BILINEAR)


def _shuffle(name: str, stem: int, channels: tuple[int, int, int], head: int, kernel: int = 3) -> ShuffleConfig:
    return ShuffleConfig(name=name, stem=stem, channels=channels, head=head, kernel=kernel, preprocessing=_BILINEAR)


_ALL: tuple[AnyConfig, ...] = (
    *(efficientnet_config(variant) for variant in PUBLISHED),
    *(efficientnet_config(f"tf-{variant}") for variant in PUBLISHED),
    *(lite_config(variant) for variant in LITE),
    MOBILENET_V2,
    _resnet(18, (2, 2, 2, 2), bottleneck=False),
    _resnet(50, (3, 4, 6, 3), bottleneck=True),
    _resnet(101, (3, 4, 23, 3), bottleneck=True),
    _shuffle("shufflenet-v2-x0.5", 24, (48, 96, 192), 1024),
    _shuffle("shufflenet-v2-x1.0", 24, (116, 232, 464), 1024),
    _shuffle("shufflenet-v2-x1.5", 24, (176, 352, 704), 1024),
    _shuffle("shufflenet-v2-x2.0", 24, (244, 488, 976), 2048),
    _shuffle("snet49", 24, (60, 120, 240), 512, kernel=5),
    _shuffle("snet146", 24, (132, 264, 528), 0, kernel=5),
    _shuffle("snet535", 48, (248, 496, 992), 0, kernel=5),
    InceptionConfig(
        name="inception-v1",
        dropout=0.2,
        preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear"),
    ),
)
CONFIGS: dict[str, AnyConfig] = {config.name: config for config in _ALL}
"""Name -> configuration, in the order in which they are listed."""
_OTHERS = {config.timm: config.name for config in _ALL if config.timm}
_OTHERS |= {"googlenet": "inception-v1", "mobilenet_v2": "mobilenet-v2"}
_OTHERS |= {name.replace("-", "_").replace(".", "_"): name for name in CONFIGS if name.startswith("shufflenet")}


def find_config(name: str) -> AnyConfig:
    """The configuration of that name, ours or timm's; UsageError with close names for any other.

    >>> find_config("efficientnet_b0").name, find_config("b0").name
    ('efficientnet-b0', 'efficientnet-b0')
    """
    canonical = next((n for n in (name, name.replace("_", "-"), f"efficientnet-{name}") if n in CONFIGS), None)
    canonical = canonical or _OTHERS.get(name)
    if canonical is None:
        raise UsageError(
            f"{name!r} is not a backbone that Volvelle knows",
            tip=did_you_mean(name, [*CONFIGS, *_OTHERS]) or f"known: {', '.join(CONFIGS)}",
        )
    return CONFIGS[canonical]
