"""Whole models wired from parts. Importing this package does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from volvelle.systems.language.load import load_language_model as load_language_model


def __getattr__(name: str) -> Any:
    if name == "load_language_model":
        from volvelle.systems.language.load import load_language_model

        return load_language_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["load_language_model"]
