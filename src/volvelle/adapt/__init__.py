"""Parameter-efficient fine-tuning on any nn.Module: `apply`, `merge`, `save` and `load` in PEFT's file format.

Names are resolved on first use, so importing the torch-free `volvelle.adapt.methods` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from volvelle.adapt.methods import LoRA
    from volvelle.adapt.model import Adapted, adapted, apply, disabled, merge, remove, unmerge
    from volvelle.adapt.peft_files import load, save
    from volvelle.adapt.run import load_run

_HOME = {
    "LoRA": "methods",
    **dict.fromkeys(("Adapted", "adapted", "apply", "disabled", "merge", "remove", "unmerge"), "model"),
    **dict.fromkeys(("load", "save"), "peft_files"),
    "load_run": "run",
}

__all__ = ["Adapted", "LoRA", "adapted", "apply", "disabled", "load", "load_run", "merge", "remove", "save", "unmerge"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
