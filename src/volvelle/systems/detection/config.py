"""Configurations of detectors, as frozen data without torch: a backbone's name, a composition, and its numbers.

A composition is one of `ThunderNet`, `RFCN` and `FasterRCNN`; beside it stand the numbers that all of them have: the
proposer's (`RPN`), how regions are chosen for the loss (`Balanced` or `Hardest`), and the last cleaning (`Post`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from volvelle.errors import UsageError, VolvelleError, did_you_mean
from volvelle.systems.native_folder import build

Shape = tuple[float, float]
"""Width and height in pixels."""
Reduce = Literal["mean", "max"]
Convention = Literal["torchvision", "rfcn", "thundernet"]
"""Where samples lie; see `volvelle.functional.ps_roi_align`."""


def anchor_shapes(scales: Sequence[float], ratios: Sequence[float]) -> tuple[Shape, ...]:
    """Every scale s (the root of the area, in pixels) with every ratio r of height to width: (s / √r, s √r).

    >>> anchor_shapes((32,), (1, 4))
    ((32.0, 32.0), (16.0, 64.0))
    """
    return tuple((s / math.sqrt(r), s * math.sqrt(r)) for s in scales for r in ratios)


THUNDERNET_ANCHORS = anchor_shapes((32, 64, 128, 256, 512), (1 / 2, 3 / 4, 1, 4 / 3, 2))
"""25 shapes: Qin et al. 2019, section 3.2, and the released configuration."""
FASTER_RCNN_ANCHORS = anchor_shapes((128, 256, 512), (1 / 2, 1, 2))
"""9 shapes: Ren et al. 2015, section 3.1.1."""


@dataclass(frozen=True)
class RPN:
    """The region proposal network's numbers.

    An anchor is positive from an IoU of `positive` on, and so are each object's `best` anchors from `floor` on; it is
    negative below `negative`; `sampled` of both, at most half of them positive, make the loss. Of the `before` highest
    scores, non-maximum suppression at `overlap` leaves at most `training` or `testing` proposals an image.
    """

    anchors: tuple[Shape, ...] = THUNDERNET_ANCHORS
    positive: float = 0.5
    negative: float = 0.3
    best: int = 3
    floor: float = 0.25
    sampled: int = 256
    before: int = 1500
    overlap: float = 0.7
    training: int = 300
    testing: int = 200

    def __post_init__(self) -> None:
        if not self.anchors or any(len(one) != 2 or min(one) <= 0 for one in self.anchors):
            raise UsageError(f"anchors: widths and heights above 0 are wanted, one pair at least, got {self.anchors}")
        if not 0 <= self.negative <= self.positive <= 1:
            raise UsageError(f"0 <= negative <= positive <= 1 is wanted, got {self.negative} and {self.positive}")
        if min(self.sampled, self.before, self.training, self.testing) < 1 or self.best < 0:
            raise UsageError("sampled, before, training and testing must be at least 1, best at least 0")


@dataclass(frozen=True)
class Balanced:
    """`count` regions an image for the head's loss: at most the share `foreground` on objects (IoU from `overlap` on).

    Objects take turns, so that one with many regions does not crowd out the others.
    """

    count: int = 128
    foreground: float = 1 / 3
    overlap: float = 0.5


@dataclass(frozen=True)
class Hardest:
    """Online hard example mining: all regions are scored, the `count` of the highest loss in each image count.

    Shrivastava et al. 2016, "Training Region-based Object Detectors with Online Hard Example Mining"; Dai et al. 2016,
    section 2.3, where it costs next to nothing.
    """

    count: int = 128
    overlap: float = 0.5


@dataclass(frozen=True)
class Post:
    """What becomes of scored boxes: those below `score` go, suppression in each class at `overlap`, the `top` stay.

    `score` is low, since the far end of the recall counts in mean average precision; who draws boxes asks for more.
    `candidates` is the most that suppression looks at in an image, highest scores first. `decay` of 0 suppresses; above
    0 it is Soft-NMS (Bodla et al. 2017), which multiplies scores by exp(-IoU² / decay) instead.
    """

    score: float = 0.01
    overlap: float = 0.5
    top: int = 100
    candidates: int = 1000
    decay: float = 0.0


@dataclass(frozen=True)
class ThunderNet:
    """Qin et al. 2019, "ThunderNet: Towards Real-time Generic Object Detection", figure 2.

    Context enhancement joins `maps` of the backbone with the picture's mean, 2: strides 16 and 32 (paper); 3: stride 8
    too, which is then where everything happens. `attention` re-weights that map for the head by what the proposer saw.
    Position-sensitive pooling gives `alpha` channels of `bins` x `bins`, `hidden` are the head's layers.
    """

    alpha: int = 5
    bins: int = 7
    maps: int = 2
    proposer: int = 256
    attention: bool = True
    hidden: tuple[int, ...] = (1024,)
    reduce: Reduce = "mean"
    convention: Convention = "torchvision"

    def __post_init__(self) -> None:
        if self.maps not in (2, 3):
            raise UsageError(f"thundernet: maps must be 2 or 3, got {self.maps}")


RELEASED = ThunderNet(hidden=(1024, 1024), reduce="max", convention="thundernet")
"""As in the authors' release of 2022: the largest of the samples, no shift by half a pixel, two layers in the head."""
RELEASED_POST = Post(decay=0.5)
"""Its Soft-NMS."""


@dataclass(frozen=True)
class RFCN:
    """Dai et al. 2016, "R-FCN: Object Detection via Region-based Fully Convolutional Networks".

    The last stage is dilated (stride 16); a 1 x 1 convolution to `width`; then `bins`² maps a class, and `bins`² · 4
    for boxes of any class, pooled position by position and averaged. The proposer looks at the stage before.
    """

    bins: int = 7
    width: int = 1024
    proposer: int = 512


@dataclass(frozen=True)
class FasterRCNN:
    """Ren et al. 2015, "Faster R-CNN", with a head of fully connected layers on each region: the baseline.

    The last stage is dilated (stride 16) and brought to `width` channels; RoIAlign gives `bins` x `bins` of them, and
    layers of `hidden` units follow. The proposer looks at the stage before.
    """

    bins: int = 7
    width: int = 256
    hidden: tuple[int, ...] = (1024, 1024)
    proposer: int = 512


Composition = ThunderNet | RFCN | FasterRCNN
COMPOSITIONS: dict[str, type[Composition]] = {"thundernet": ThunderNet, "rfcn": RFCN, "faster-rcnn": FasterRCNN}
"""What config.json calls them."""
Sampling = Balanced | Hardest
SAMPLINGS: dict[str, type[Sampling]] = {"balanced": Balanced, "hardest": Hardest}


@dataclass(frozen=True)
class DetectorConfig:
    """A backbone by name, a composition, the classes' names, and the numbers that every detector has.

    `size` is the length in pixels that pictures' longer sides are brought to, or with `stretch` both of them.
    `deformable` counts the convolutions that `deformify` made deformable, and says by being above 0 that
    position-sensitive pooling is too.
    """

    backbone: str
    composition: Composition
    classes: tuple[str, ...]
    rpn: RPN = field(default_factory=RPN)
    sampling: Sampling = field(default_factory=Balanced)
    post: Post = field(default_factory=Post)
    size: int = 320
    deformable: int = 0
    stretch: bool = True

    def __post_init__(self) -> None:
        if not self.classes:
            raise UsageError("a detector needs at least one class")

    def to_json(self) -> dict[str, Any]:
        """Plain data for config.json."""
        kinds = {
            "composition": {"type": _name(COMPOSITIONS, self.composition), **asdict(self.composition)},
            "sampling": {"type": _name(SAMPLINGS, self.sampling), **asdict(self.sampling)},
        }
        return {"type": "detector", **asdict(self), **kinds}

    @classmethod
    def from_json(cls, values: dict[str, Any], source: str) -> DetectorConfig:
        """Undo `to_json`. Raises VolvelleError that names `source` and what does not fit."""
        given = dict(values)
        if given.pop("type", None) != "detector":
            raise VolvelleError(f"{source}: not the configuration of a detector")
        for name, kinds in (("composition", COMPOSITIONS), ("sampling", SAMPLINGS)):
            if name in given or name == "composition":
                given[name] = _typed(kinds, name, given.get(name), source)
        for name, kind in (("rpn", RPN), ("post", Post)):
            if name in given:
                given[name] = build(kind, _mapping(given[name], name, source), source)
        return build(cls, given, source)

    def with_anchors(self, anchors: Sequence[Shape]) -> DetectorConfig:
        """The same with other anchors."""
        shapes = tuple((float(width), float(height)) for width, height in anchors)
        return replace(self, rpn=replace(self.rpn, anchors=shapes))


def _name(kinds: dict[str, Any], value: Any) -> str:
    return next(name for name, kind in kinds.items() if type(value) is kind)


def _mapping(value: Any, name: str, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise VolvelleError(f"{source}: {name} must be an object, got {value!r}")
    return dict(value)


def _typed(kinds: dict[str, Any], name: str, value: Any, source: str) -> Any:
    fields = _mapping(value, name, source)
    kind = fields.pop("type", None)
    if kind not in kinds:
        raise VolvelleError(f"{source}: unknown {name} {kind!r}", tip=did_you_mean(str(kind), kinds))
    return build(kinds[kind], fields, source)
