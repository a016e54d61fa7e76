"""Whole models wired from parts. Importing this package does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volvelle.lazy import lazy

if TYPE_CHECKING:
    from volvelle.systems.backbone.load import efficientnet as efficientnet
    from volvelle.systems.detection.load import rfcn as rfcn
    from volvelle.systems.detection.load import thundernet as thundernet
    from volvelle.systems.generation.load import load_vqgan as load_vqgan
    from volvelle.systems.generation.load import open_codec as open_codec
    from volvelle.systems.generation.load import vqgan as vqgan
    from volvelle.systems.language.load import load_language_model as load_language_model
    from volvelle.systems.segmentation.load import gcn as gcn
    from volvelle.systems.segmentation.sam.load import load_sam as load_sam
    from volvelle.systems.segmentation.sam.load import sam as sam

_HOMES = {
    "efficientnet": "backbone.load",
    "gcn": "segmentation.load",
    "load_language_model": "language.load",
    "load_sam": "segmentation.sam.load",
    "load_vqgan": "generation.load",
    "open_codec": "generation.load",
    "rfcn": "detection.load",
    "sam": "segmentation.sam.load",
    "thundernet": "detection.load",
    "vqgan": "generation.load",
}

__getattr__, __dir__ = lazy(__name__, _HOMES)
