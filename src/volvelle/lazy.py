"""Packages that load a name's module when it is first asked for, so that their torch-free files stay free of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`; `homes` says in which of its modules each public name is.

    >>> get, names = lazy("volvelle", {"VolvelleError": "errors"})
    >>> get("VolvelleError").__name__, names()
    ('VolvelleError', ['VolvelleError'])
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return get, lambda: sorted(homes)
