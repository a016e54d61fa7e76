"""Whole models wired from parts. Importing this package does not import torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from volvelle.systems.backbone.load import efficientnet as efficientnet
    from volvelle.systems.language.load import load_language_model as load_language_model
    from volvelle.systems.segmentation.load import gcn as gcn

_HOMES = {"efficientnet": "backbone.load", "gcn": "segmentation.load", "load_language_model": "language.load"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
