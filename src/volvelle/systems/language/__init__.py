"""Decoder language models: one model class for several families, and readers and writers of their files.

Importing this package, or its `config`, does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from volvelle.systems.language.config import LanguageConfig as LanguageConfig
    from volvelle.systems.language.decoder import Decoder as Decoder
    from volvelle.systems.language.huggingface import read_folder as read_folder
    from volvelle.systems.language.huggingface import write_folder as write_folder
    from volvelle.systems.language.load import load_language_model as load_language_model
    from volvelle.systems.language.projections import fuse_projections as fuse_projections
    from volvelle.systems.language.projections import unfuse_projections as unfuse_projections

_HOMES = {
    "LanguageConfig": "config",
    "Decoder": "decoder",
    "read_folder": "huggingface",
    "write_folder": "huggingface",
    "load_language_model": "load",
    "fuse_projections": "projections",
    "unfuse_projections": "projections",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
