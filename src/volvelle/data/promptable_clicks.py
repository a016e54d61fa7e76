"""Simulated prompts: where somebody who wants an object would click, and how they would draw a box around it.

The first click lies in the object; each further one in the middle of what is most wrong: of what was missed a click
for the object, of what is too much a click against it. Coordinates are (x, y) of whole pixels; boxes x1 y1 x2 y2.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
from scipy import ndimage

COARSE = 64
"""The longest side of a region, in cells, on which training looks for its middle."""


class Click(NamedTuple):
    """A pixel, and whether it is of the object (1) or not (0)."""

    x: int
    y: int
    label: int


def middle(region: np.ndarray, limit: int | None = None) -> tuple[int, int, float] | None:
    """(x, y, distance) of the pixel of a region bool (y, x) that is farthest from all outside it; None without pixels.

    What lies beyond the picture is outside. Of equal ones the first in reading order. With `limit`, only every n-th
    pixel of a region with longer sides is looked at.

    >>> region = np.zeros((5, 9), dtype=bool)
    >>> region[1:4, 2:7] = True
    >>> middle(region)
    (3, 2, 2.0)
    """
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    if not len(rows):
        return None
    top, left = int(rows[0]), int(columns[0])
    part = region[top : rows[-1] + 1, left : columns[-1] + 1]
    step = 1 if limit is None else max(1, -(-max(part.shape) // limit))
    coarse = part[step // 2 :: step, step // 2 :: step]
    if not coarse.any():  # thinner than a step
        step, coarse = 1, part
    depth = ndimage.distance_transform_edt(np.pad(coarse, 1))[1:-1, 1:-1]  # pyright: ignore[reportCallIssue, reportArgumentType, reportOptionalSubscript]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    offset = step // 2 if step > 1 else 0
    return left + offset + int(x) * step, top + offset + int(y) * step, float(depth[y, x]) * step


def anywhere(region: np.ndarray, generator: random.Random) -> tuple[int, int]:
    """(x, y) of any pixel of a region that has some, each as likely."""
    at = np.flatnonzero(region)
    row, column = divmod(int(at[generator.randrange(len(at))]), region.shape[1])
    return column, row


def first_click(mask: np.ndarray, generator: random.Random, central: float = 0.5) -> Click:
    """A click in an object that has pixels: with chance `central` its middle, else anywhere in it."""
    if generator.random() < central:
        found = middle(mask, COARSE)
        assert found is not None
        return Click(found[0], found[1], 1)
    return Click(*anywhere(mask, generator), 1)


def next_click(
    seen: np.ndarray,
    truth: np.ndarray,
    known: np.ndarray | None = None,
    *,
    generator: random.Random | None = None,
    limit: int | None = None,
) -> Click | None:
    """The middle of the largest error of a mask `seen` (y, x), as Xu et al. 2016 and Sofiiuk et al. 2022 measure.

    What was missed and what is too much are compared by their distance transforms; errors outside `known` do not
    count. With a `generator`, as in training, any pixel of that kind of error, chosen by size. None where nothing is
    wrong.

    >>> truth, seen = np.zeros((2, 5, 9), dtype=bool)
    >>> truth[1:4, 2:7] = True
    >>> seen[0, 0] = True
    >>> next_click(seen, truth)
    Click(x=3, y=2, label=1)
    """
    missed, more = truth & ~seen, seen & ~truth
    if known is not None:
        missed, more = missed & known, more & known
    if generator is not None:
        counts = int(missed.sum()), int(more.sum())
        if not sum(counts):
            return None
        inside = generator.randrange(sum(counts)) < counts[0]
        return Click(*anywhere(missed if inside else more, generator), int(inside))
    found = [(middle(region, limit), label) for region, label in ((missed, 1), (more, 0))]
    deepest = max(((place[2], label, place) for place, label in found if place), default=None)
    return None if deepest is None else Click(deepest[2][0], deepest[2][1], deepest[1])


def box_around(mask: np.ndarray, generator: random.Random | None = None) -> tuple[float, float, float, float]:
    """The box of a mask that has pixels; with a generator as somebody draws it.

    Each side is then off by a normal number with a tenth of the box's side as deviation, 20 pixels at most (Kirillov et
    al. 2023, appendix A); the box stays in the picture, and has an area.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x1, x2, y1, y2 = (float(v) for v in (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1))
    if generator is None:
        return x1, y1, x2, y2
    high, wide = mask.shape

    def off(side: float) -> float:
        return max(-20.0, min(20.0, generator.gauss(0, 0.1 * side)))

    left, right = (min(max(x + off(x2 - x1), 0.0), float(wide)) for x in (x1, x2))
    top, bottom = (min(max(y + off(y2 - y1), 0.0), float(high)) for y in (y1, y2))
    if right - left < 1 or bottom - top < 1:
        return x1, y1, x2, y2
    return left, top, right, bottom
