"""timm where torchvision's compiled operators do not load: its networks never use them, only its imports do."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAMES = (
    "torchvision", "torchvision.ops", "torchvision.ops.misc", "torchvision.transforms",
    "torchvision.transforms.functional", "torchvision.datasets", "torchvision.models",
)  # fmt: skip


class _Names(type):
    """A class whose every attribute is its own name, as members of an enumeration would be."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stand(ModuleType):
    """A module whose every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {})


def load_timm() -> Any:
    """The module timm. Raises ImportError where it is not installed."""
    with _torchvision():
        return importlib.import_module("timm")


@contextlib.contextmanager
def _torchvision() -> Iterator[None]:
    """torchvision, or stand-ins for as long as timm is being imported."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in NAMES:
            stand = _Stand(name)
            stand.__spec__, stand.__path__ = ModuleSpec(name, None), []
            sys.modules[name] = stand
            owner, _, leaf = name.rpartition(".")
            if owner:
                setattr(sys.modules[owner], leaf, stand)
        try:
            yield
        finally:
            for name in NAMES:
                sys.modules.pop(name, None)
    else:
        yield
