"""Segment Anything: promptable segmentation by points, boxes and masks. Importing it does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volvelle.lazy import lazy

if TYPE_CHECKING:
    from volvelle.systems.segmentation.sam.config import PRESETS as PRESETS
    from volvelle.systems.segmentation.sam.config import Light as Light
    from volvelle.systems.segmentation.sam.config import SamConfig as SamConfig
    from volvelle.systems.segmentation.sam.config import ViT as ViT
    from volvelle.systems.segmentation.sam.embedding import Embedding as Embedding
    from volvelle.systems.segmentation.sam.everything import Everything as Everything
    from volvelle.systems.segmentation.sam.everything import FoundMask as FoundMask
    from volvelle.systems.segmentation.sam.load import holds_sam as holds_sam
    from volvelle.systems.segmentation.sam.load import is_sam as is_sam
    from volvelle.systems.segmentation.sam.load import load_sam as load_sam
    from volvelle.systems.segmentation.sam.load import sam as sam
    from volvelle.systems.segmentation.sam.load import write_sam as write_sam
    from volvelle.systems.segmentation.sam.model import Sam as Sam
    from volvelle.systems.segmentation.sam.options import EverythingOptions as EverythingOptions
    from volvelle.systems.segmentation.sam.promptable import Masks as Masks
    from volvelle.systems.segmentation.sam.promptable import Promptable as Promptable

_HOMES = {
    "Embedding": "embedding",
    "Everything": "everything",
    "EverythingOptions": "options",
    "FoundMask": "everything",
    "Light": "config",
    "Masks": "promptable",
    "PRESETS": "config",
    "Promptable": "promptable",
    "Sam": "model",
    "SamConfig": "config",
    "ViT": "config",
    "holds_sam": "load",
    "is_sam": "load",
    "load_sam": "load",
    "sam": "load",
    "write_sam": "load",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = lazy(__name__, _HOMES)
