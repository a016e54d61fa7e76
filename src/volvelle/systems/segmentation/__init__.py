"""Semantic segmentation on any backbone: GCN, atrous decoders, FCN and U-Net. Importing it does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volvelle.lazy import lazy

if TYPE_CHECKING:
    from volvelle.systems.segmentation.config import ASPP as ASPP
    from volvelle.systems.segmentation.config import FCN as FCN
    from volvelle.systems.segmentation.config import GCN as GCN
    from volvelle.systems.segmentation.config import Context as Context
    from volvelle.systems.segmentation.config import SegmenterConfig as SegmenterConfig
    from volvelle.systems.segmentation.config import UNet as UNet
    from volvelle.systems.segmentation.inference import Looks as Looks
    from volvelle.systems.segmentation.inference import probabilities as probabilities
    from volvelle.systems.segmentation.load import gcn as gcn
    from volvelle.systems.segmentation.load import read_segmenter as read_segmenter
    from volvelle.systems.segmentation.load import segmenter as segmenter
    from volvelle.systems.segmentation.load import write_segmenter as write_segmenter
    from volvelle.systems.segmentation.model import Segmenter as Segmenter

_HOMES = {
    "ASPP": "config",
    "Context": "config",
    "FCN": "config",
    "GCN": "config",
    "Looks": "inference",
    "Segmenter": "model",
    "SegmenterConfig": "config",
    "UNet": "config",
    "gcn": "load",
    "probabilities": "inference",
    "read_segmenter": "load",
    "segmenter": "load",
    "write_segmenter": "load",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = lazy(__name__, _HOMES)
