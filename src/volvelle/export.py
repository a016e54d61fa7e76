"""Public names, apart from where the code lies (the decorator records them; `python -m volvelle.export` writes the facades)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


def export(
    name: str,
    *,
    aliases: Sequence[str] = (),
    since: str = "0.1",
    deprecated: Mapping[str, str] | None = None,
    twin: Callable[..., Any] | None = None,
) -> Callable[[T], T]:
    """Mark an object as public under `name` ("functional.apply_rope"); returns it unchanged."""

    def record(target: T) -> T:
        return target

    return record
