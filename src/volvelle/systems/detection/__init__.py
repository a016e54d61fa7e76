"""Detectors on any backbone: ThunderNet, R-FCN, Faster R-CNN, deformable or not. Importing it does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volvelle.lazy import lazy

if TYPE_CHECKING:
    from volvelle.systems.detection.compositions import compose as compose
    from volvelle.systems.detection.config import RFCN as RFCN
    from volvelle.systems.detection.config import RPN as RPN
    from volvelle.systems.detection.config import Balanced as Balanced
    from volvelle.systems.detection.config import DetectorConfig as DetectorConfig
    from volvelle.systems.detection.config import FasterRCNN as FasterRCNN
    from volvelle.systems.detection.config import Hardest as Hardest
    from volvelle.systems.detection.config import Post as Post
    from volvelle.systems.detection.config import ThunderNet as ThunderNet
    from volvelle.systems.detection.deforming import deformify as deformify
    from volvelle.systems.detection.load import detector as detector
    from volvelle.systems.detection.load import read_detector as read_detector
    from volvelle.systems.detection.load import rfcn as rfcn
    from volvelle.systems.detection.load import thundernet as thundernet
    from volvelle.systems.detection.load import write_detector as write_detector
    from volvelle.systems.detection.model import Detector as Detector
    from volvelle.systems.detection.names import named as named
    from volvelle.systems.detection.targets import Detections as Detections
    from volvelle.systems.detection.targets import Targets as Targets

_HOMES = {
    "Balanced": "config",
    "Detections": "targets",
    "Detector": "model",
    "DetectorConfig": "config",
    "FasterRCNN": "config",
    "Hardest": "config",
    "Post": "config",
    "RFCN": "config",
    "RPN": "config",
    "Targets": "targets",
    "ThunderNet": "config",
    "compose": "compositions",
    "deformify": "deforming",
    "detector": "load",
    "named": "names",
    "read_detector": "load",
    "rfcn": "load",
    "thundernet": "load",
    "write_detector": "load",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = lazy(__name__, _HOMES)
