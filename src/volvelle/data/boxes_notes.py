"""What files say of pictures and their boxes, before anything is checked against the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Object:
    """One box as a file has it: the class's name, x1 y1 x2 y2, whether it is ignored, its area, and where it stands.

    `area` is that of the object itself where the file knows it, None for the box's. `outline` is the file's own record
    of its mask (COCO's polygons or run lengths), where the reader was asked for it.
    """

    name: str
    box: Corners
    where: str
    ignored: bool = False
    area: float | None = None
    outline: Any = None


@dataclass(frozen=True)
class Note:
    """A picture, the size (width, height) that its file claims, its objects, where that stands, and what is wrong."""

    image: Path
    where: str
    objects: tuple[Object, ...] = ()
    size: tuple[int, int] | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Notes:
    """The pictures of one split, the names of the classes where the file lists them, and lines that fit nowhere."""

    notes: Sequence[Note]
    classes: tuple[str, ...] = ()
    problems: tuple[tuple[str, str], ...] = ()
