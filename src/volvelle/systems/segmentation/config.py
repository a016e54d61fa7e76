"""Configurations of segmenters, as frozen data without torch: an encoder's name and one of the decoders below."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from volvelle.errors import UsageError, VolvelleError, did_you_mean
from volvelle.systems.backbone.config import OutputStride
from volvelle.systems.native_folder import build


@dataclass(frozen=True)
class GCN:
    """Global convolutional network: Peng et al. 2017, figure 2.

    `kernel` is k, `refine` whether boundary refinement follows. Scores have `width` channels on the way, as many as
    there are classes when None (the paper). `detail` adds a branch of that many channels at stride 2, from the pixels;
    the paper's decoder ends at the encoder's finest map.
    """

    kernel: int = 7
    width: int | None = None
    refine: bool = True
    detail: int = 0


@dataclass(frozen=True)
class ASPP:
    """Atrous spatial pyramid pooling: Chen et al. 2017 (DeepLabv3), and 2018 (v3+) with `low` channels of stride 4."""

    rates: tuple[int, ...] = (6, 12, 18)
    width: int = 256
    low: int = 48


@dataclass(frozen=True)
class Context:
    """The context module of Yu & Koltun 2016, table 1 ("basic"), behind the encoder's last map: for output stride 8."""

    rates: tuple[int, ...] = (1, 1, 2, 4, 8, 16, 1)


@dataclass(frozen=True)
class FCN:
    """Fully convolutional network: Long et al. 2015; `finest` 32, 16 or 8 is the stride of the finest scores added."""

    finest: int = 8


@dataclass(frozen=True)
class UNet:
    """U-Net: Ronneberger et al. 2015, up to the encoder's finest map; `width` channels there, twice as many a stage."""

    width: int = 32


Head = GCN | ASPP | Context | FCN | UNet
HEADS: dict[str, type[Head]] = {"gcn": GCN, "aspp": ASPP, "context": Context, "fcn": FCN, "unet": UNet}
"""What config.json calls them."""


@dataclass(frozen=True)
class SegmenterConfig:
    """An encoder by name, a decoder, and the classes: their names and the colours that pictures show them in."""

    backbone: str
    head: Head
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...] = ()
    output_stride: OutputStride = 32

    def __post_init__(self) -> None:
        if not self.classes:
            raise UsageError("a segmenter needs at least one class")
        if self.colours and len(self.colours) != len(self.classes):
            raise UsageError(f"{len(self.classes)} classes need as many colours, got {len(self.colours)}")

    def to_json(self) -> dict[str, Any]:
        """Plain data for config.json."""
        kind = next(name for name, head in HEADS.items() if type(self.head) is head)
        return {"type": "segmenter", **asdict(self), "head": {"type": kind, **asdict(self.head)}}

    @classmethod
    def from_json(cls, values: dict[str, Any], source: str) -> SegmenterConfig:
        """Undo `to_json`. Raises VolvelleError that names `source` and what does not fit."""
        given = dict(values)
        if given.pop("type", None) != "segmenter" or not isinstance(given.get("head"), dict):
            raise VolvelleError(f"{source}: not the configuration of a segmenter")
        head = dict(given.pop("head"))
        kind = head.pop("type", None)
        if kind not in HEADS:
            raise VolvelleError(f"{source}: unknown head {kind!r}", tip=did_you_mean(str(kind), HEADS))
        return build(cls, {**given, "head": build(HEADS[kind], head, source)}, source)
