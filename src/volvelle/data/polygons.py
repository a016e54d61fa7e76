"""Masks as polygons: their outlines, drawn exactly, and polygons as masks, filled as pycocotools fills them.

Filling: a column x of pixels is looked at along its middle, x + 1/2. The outline's points are rounded to fifths of a
pixel, its edges drawn there step by step, and wherever an edge crosses a middle the column changes between inside and
outside, from the next pixel on. Tracing: the outline runs along the pixels' borders, so that filling gives the mask
again. A hole is joined to its outline by a cut that is walked there and back; crossings of the cut cancel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volvelle.data.run_lengths import RunLengths, union
from volvelle.errors import VolvelleError

FINE = 5
"""Steps a pixel in which outlines are drawn."""
FARTHEST = 2**24
"""The largest coordinate that is believed."""


def fill_polygons(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> RunLengths:
    """The mask (height, width) of all pixels inside any of the polygons, each x1 y1 x2 y2 … in pixels.

    Raises VolvelleError for a polygon of fewer than three points, of an odd number of coordinates, or of others than
    numbers.

    >>> fill_polygons([[1, 0, 3, 0, 3, 2, 1, 2]], (3, 4)).mask().astype(int).tolist()
    [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    return union([RunLengths.between(_crossings(_points(one), size), size) for one in polygons] or [_nothing(size)])


def trace_polygons(mask: np.ndarray | RunLengths, *, tolerance: float = 0.0) -> list[list[float]]:
    """The outlines of a mask (y, x) as polygons x1 y1 x2 y2 …, one for each connected piece (by sides, not corners).

    `fill_polygons` of them gives the mask again, holes too. With a `tolerance` above 0 points are left out that lie no
    farther than that, in pixels, from the line between those that stay (Douglas and Peucker 1973); pieces and holes
    that become flat are left out.

    >>> trace_polygons(np.array([[0, 1, 1], [0, 1, 1]], dtype=bool))
    [[1.0, 0.0, 1.0, 2.0, 3.0, 2.0, 3.0, 0.0]]
    """
    from scipy import ndimage

    if isinstance(mask, RunLengths):  # of which only the box is looked through
        x1, y1, x2, y2 = mask.box
        inside = trace_polygons(mask.mask()[y1:y2, x1:x2], tolerance=tolerance)
        return [np.add(np.reshape(one, (-1, 2)), (x1, y1)).ravel().tolist() for one in inside]
    filled = np.ascontiguousarray(mask, dtype=bool)
    pieces = np.zeros(filled.shape, dtype=np.int32)
    count = int(ndimage.label(filled, output=pieces))  # pyright: ignore[reportArgumentType]
    outlines: list[list[np.ndarray]] = [[] for _ in range(count)]
    for ring in _rings(np.pad(filled, 1)):
        # A ring's first corner is its leftmost of the topmost row: the pixel below right of it is inside an outline,
        # and outside, in a hole.
        x, y = ring[0]
        inside = filled[y, x]
        piece = int(pieces[y, x] if inside else pieces[y - 1, x]) - 1
        kept = ring.astype(float) if tolerance <= 0 else _simpler(ring.astype(float), tolerance)
        if len(kept) >= 3:
            outlines[piece].insert(0 if inside else len(outlines[piece]), kept)
        elif inside:
            outlines[piece] = []
    return [_joined(rings).ravel().tolist() for rings in outlines if rings]


def _nothing(size: tuple[int, int]) -> RunLengths:
    return RunLengths.between(np.zeros(0, dtype=np.int64), size)


def _points(polygon: Sequence[float]) -> np.ndarray:
    try:
        flat = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError):
        flat = np.full(1, np.nan)
    if flat.ndim != 1 or not np.isfinite(flat).all():
        raise VolvelleError(f"polygon: wants numbers x1, y1, x2, y2, …, got {str(polygon)[:60]}")
    if len(flat) < 6 or len(flat) % 2:
        raise VolvelleError(f"polygon: wants three points or more, two numbers each, got {len(flat)} numbers")
    if np.abs(flat).max() > FARTHEST:
        raise VolvelleError(f"polygon: a coordinate of {np.abs(flat).max():g} pixels")
    return flat.reshape(-1, 2)


def _crossings(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where columns change between outside and inside, as indices x height + y in rising order, repeated ones too."""
    high, wide = size
    corners = _truncated(FINE * points + 0.5)
    begin, end = corners, np.roll(corners, -1, axis=0)
    steps = np.abs(end - begin)
    along = (steps[:, 0] < steps[:, 1]).astype(np.int64)  # the axis on which an edge is drawn step by step
    rows = np.arange(len(begin))
    # An edge is drawn the same in both directions: from its lower end on the axis it is drawn along.
    turned = begin[rows, along] > end[rows, along]
    low, top = np.where(turned[:, None], end, begin), np.where(turned[:, None], begin, end)
    length = steps.max(1)
    slope = (top[rows, 1 - along] - low[rows, 1 - along]) / np.maximum(length, 1)
    edge = np.repeat(rows, length + 1)
    done = np.arange(len(edge)) - np.repeat(np.cumsum(length + 1) - length - 1, length + 1)
    at = np.where(turned[edge], length[edge] - done, done)
    walked = low[edge, along[edge]] + at
    beside = _truncated(low[edge, 1 - along[edge]] + slope[edge] * at + 0.5)
    x, y = np.where(along[edge] == 0, walked, beside), np.where(along[edge] == 0, beside, walked)
    moved = np.flatnonzero(np.diff(x)) + 1
    left, upper = np.minimum(x[moved], x[moved - 1]), np.minimum(y[moved], y[moved - 1])
    column, middle = np.divmod(left, FINE)
    here = (middle == FINE // 2) & (column >= 0) & (column < wide)
    row = np.ceil(np.clip((upper[here] + 0.5) / FINE - 0.5, 0, high)).astype(np.int64)
    return np.sort(column[here] * high + row)


def _truncated(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int64)


def _rings(framed: np.ndarray) -> list[np.ndarray]:
    """The borders of a mask with a frame of zeros, each as its corners (k, 2), x y without the frame, outline or hole.

    A corner of the lattice is one of a border where one or three of the four pixels around it are set, and twice one
    where two are set that touch only there. In a row of the lattice corners are joined in pairs, and so in a column.
    """
    a, b, c, d = framed[:-1, :-1], framed[:-1, 1:], framed[1:, :-1], framed[1:, 1:]
    single = a ^ b ^ c ^ d
    falling, rising = a & d & ~b & ~c, b & c & ~a & ~d  # set pixels touch like \ or like /
    y, x = np.nonzero(single | falling | rising)
    twice = (~single)[y, x]
    order = np.repeat(np.arange(len(x)), 1 + twice)  # by rows; the first of two goes left, the second right
    x, y = x[order], y[order]
    second = np.concatenate(([False], order[1:] == order[:-1])) if len(order) else np.zeros(0, dtype=bool)
    # Of a double corner the first goes up where the pixels touch like \, and the second where they touch like /.
    goes_down = np.where(falling[y, x], second, ~second)
    by_column = np.lexsort((goes_down, y, x))
    partner = np.empty(len(x), dtype=np.int64)
    partner[by_column[0::2]], partner[by_column[1::2]] = by_column[1::2], by_column[0::2]
    down = partner.tolist()
    seen, rings = [False] * len(down), list[np.ndarray]()
    for start in range(len(down)):
        if seen[start]:
            continue
        ring, corner = list[int](), start
        while not seen[corner]:
            other = down[corner]
            seen[corner] = seen[other] = True
            ring += [corner, other]
            corner = other ^ 1  # pairs of a row stand beside each other
        rings.append(np.stack((x[ring], y[ring]), axis=1))
    return rings


def _simpler(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """Douglas and Peucker's points of a closed ring: its first, the one farthest from it, and what those need."""
    far = int(((ring - ring[0]) ** 2).sum(1).argmax())
    closed = np.concatenate((ring, ring[:1]))
    keep = np.zeros(len(closed), dtype=bool)
    keep[[0, far, -1]] = True
    stack = [(0, far), (far, len(ring))]
    while stack:
        begin, end = stack.pop()
        if end - begin < 2:
            continue
        between, line = closed[begin + 1 : end] - closed[begin], closed[end] - closed[begin]
        length = float((line**2).sum())
        share = np.clip(between @ line / length, 0, 1) if length else np.zeros(len(between))
        away = ((between - share[:, None] * line) ** 2).sum(1)
        worst = int(away.argmax())
        if away[worst] > tolerance**2:
            keep[begin + 1 + worst] = True
            stack += [(begin, begin + 1 + worst), (begin + 1 + worst, end)]
    return ring[keep[:-1]]


def _joined(rings: list[np.ndarray]) -> np.ndarray:
    """One ring of an outline and its holes: from each hole's first corner a cut to the outline's first, and back."""
    outline, *holes = rings
    parts = [outline]
    for hole in holes:
        parts += [outline[:1], hole, hole[:1]]
    return np.concatenate(parts)
