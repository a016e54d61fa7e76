"""Detectors by name: a composition and a backbone. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from volvelle.errors import UsageError, did_you_mean
from volvelle.systems.backbone.names import find_config
from volvelle.systems.detection.config import (
    COMPOSITIONS,
    FASTER_RCNN_ANCHORS,
    RPN,
    Balanced,
    DetectorConfig,
    FasterRCNN,
    Hardest,
)

NAMES = (
    "thundernet-snet49",
    "thundernet-snet146",
    "thundernet-snet535",
    "thundernet-efficientnet-lite0",
    "rfcn-resnet-50",
    "rfcn-resnet-101",
    "faster-rcnn-resnet-50",
    "faster-rcnn-resnet-101",
)
"""The usual ones; any composition goes with any backbone."""
_STAGES = RPN(anchors=FASTER_RCNN_ANCHORS, positive=0.7, best=1, floor=0.0, before=6000, training=300, testing=300)
"""The proposer of R-FCN (Dai et al. 2016, section 2.4) and Faster R-CNN: 9 anchors, 300 regions."""


def named(name: str, classes: int | Sequence[str] = 80) -> DetectorConfig:
    """The configuration of a name such as "thundernet-snet49", with the numbers of its paper.

    `classes` are their names, or how many. Raises UsageError with close names for any other.

    >>> named("rfcn-resnet-50", ("cat", "dog")).rpn.testing
    300
    """
    kind = next((kind for kind in COMPOSITIONS if name.startswith(f"{kind}-")), None)
    if kind is None:
        tip = did_you_mean(name, NAMES) or f"a composition and a backbone: {', '.join(NAMES)}"
        raise UsageError(f"{name!r} is not a detector that Volvelle knows", tip=tip)
    backbone = find_config(name.removeprefix(f"{kind}-")).name
    names = tuple(f"class {i}" for i in range(classes)) if isinstance(classes, int) else tuple(classes)
    config = DetectorConfig(backbone, COMPOSITIONS[kind](), names)
    if kind == "thundernet":
        return config
    sampling = Balanced(foreground=0.25) if isinstance(config.composition, FasterRCNN) else Hardest()
    return replace(config, rpn=_STAGES, sampling=sampling, size=1000)
