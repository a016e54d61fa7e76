"""Masks as run lengths, as COCO stores them: down the columns, first a run of 0, then of 1, and so on in turn.

    counts = [zeros, ones, zeros, ...],  sum(counts) = y x;   pixel (x, y) has the index x * height + y

A mask that begins with a 1 begins with a run of 0 zeros. In files the counts are a list of numbers (uncompressed) or
a string: each count less the count two before it (from the fourth on), in groups of 5 bits, the lowest first; a group
is one letter, code 48 + bits + 32 where more groups follow; the last group's top bit is the sign. Equal, letter by
letter, to what pycocotools writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from volvelle.errors import VolvelleError

GROUPS = 13
"""More groups of 5 bits than a count of 64 bits needs."""
MOST = 2**40
"""The largest number of pixels that is believed."""


@dataclass(frozen=True, eq=False)
class RunLengths:
    """One mask: its size (height, width), and the run lengths, int64, as COCO orders them.

    >>> mask = RunLengths.of(np.array([[0, 1, 1], [0, 1, 0]], dtype=bool))
    >>> mask.counts.tolist(), mask.area, mask.box, mask.to_coco()
    ([2, 3, 1], 3, (1, 0, 3, 2), {'size': [2, 3], 'counts': '231'})
    """

    size: tuple[int, int]
    counts: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunLengths) and self.size == other.size and np.array_equal(self.counts, other.counts)

    def __hash__(self) -> int:
        return hash((self.size, self.counts.astype(np.int64, copy=False).tobytes()))

    @classmethod
    def of(cls, mask: np.ndarray) -> RunLengths:
        """Encode a mask (y, x), bool or integers that are 0 or not. Raises VolvelleError for other dimensions."""
        if mask.ndim != 2:
            raise VolvelleError(
                f"run lengths: a mask is (y, x), got {tuple(mask.shape)}", tip="one mask at a time: masks[0]"
            )
        return cls.placed(np.ascontiguousarray(mask.T, dtype=bool), (0, 0), (mask.shape[0], mask.shape[1]))

    @classmethod
    def placed(cls, columns: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> RunLengths:
        """Encode part of a mask, the rest being 0: bool `columns` (x, y), whose first pixel lies at `corner` (x, y).

        Nothing as large as the mask is made.
        """
        return cls.between(edges_of(columns, corner, size[0]), size)

    @classmethod
    def between(cls, edges: np.ndarray, size: tuple[int, int]) -> RunLengths:
        """The mask that changes at each of these indices, in rising order; one that stands twice changes nothing."""
        if len(edges) > 1:
            again = edges[1:] == edges[:-1]
            if again.any():
                values, times = np.unique(edges, return_counts=True)
                edges = values[times % 2 == 1]
        total = size[0] * size[1]
        edges = edges[edges < total]
        return cls(size, np.diff(edges, prepend=0, append=total))

    @cached_property
    def edges(self) -> np.ndarray:
        """Where each run of ones begins and where it ends, in turn, as indices (2 r), int64."""
        found = np.cumsum(self.counts)
        return found if len(found) % 2 == 0 else found[:-1]

    @cached_property
    def area(self) -> int:
        """Pixels that are 1."""
        return int(self.counts[1::2].sum())

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """The corners x1 y1 x2 y2 around all pixels that are 1, x2 and y2 behind the last; zeros for an empty mask."""
        begin, end = self.edges[0::2], self.edges[1::2]
        full = end > begin
        begin, last = begin[full], end[full] - 1
        if not len(begin):
            return 0, 0, 0, 0
        high = self.size[0]
        (left, top), (right, bottom) = np.divmod(begin, high), np.divmod(last, high)
        crosses = bool((left != right).any())  # a run that goes on in the next column touches both borders
        y1, y2 = (0, high) if crosses else (int(top.min()), int(bottom.max()) + 1)
        return int(left.min()), y1, int(right.max()) + 1, y2

    def mask(self) -> np.ndarray:
        """The mask as bool (y, x)."""
        values = np.zeros(len(self.counts), dtype=bool)
        values[1::2] = True
        return np.repeat(values, self.counts).reshape(self.size[1], self.size[0]).T

    def thinned(self, step: int) -> np.ndarray:
        """Of each `step` x `step` pixels the middle one, bool (y / step, x / step), rounded up; one by one looked up.

        >>> RunLengths.of(np.eye(5, dtype=bool)).thinned(2).astype(int).tolist()
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
        """
        if step == 1:
            return self.mask()
        y, x = (np.minimum(np.arange(0, side, step) + step // 2, side - 1) for side in self.size)
        return np.searchsorted(self.edges, x * self.size[0] + y[:, None], side="right") % 2 == 1

    def to_coco(self, *, compressed: bool = True) -> dict[str, Any]:
        """What COCO writes as `segmentation`: size, and counts as a string or as a list."""
        counts = compress(self.counts) if compressed else self.counts.tolist()
        return {"size": list(self.size), "counts": counts}

    @classmethod
    def from_coco(cls, record: Mapping[str, Any]) -> RunLengths:
        """Read such a record. Raises VolvelleError for counts that are no counts, or are not as many as the size."""
        size, counts = record.get("size"), record.get("counts")
        if not isinstance(size, Sequence) or len(size) != 2 or not all(_whole(side) for side in size):
            raise VolvelleError(f"run lengths: size must be height and width, whole numbers, got {size!r}")
        if isinstance(counts, str | bytes):
            found = expand(counts)
        elif isinstance(counts, Sequence | np.ndarray) and all(_whole(count) for count in counts):
            found = np.array(counts, dtype=np.int64)
        else:
            raise VolvelleError(f"run lengths: counts must be a string or whole numbers, got {str(counts)[:40]!r}")
        total = size[0] * size[1]
        if total > MOST or (len(found) and (found.min() < 0 or found.max() > total)) or found.sum() != total:
            told = f"{size[0]} x {size[1]} = {total}"
            raise VolvelleError(f"run lengths: counts must be above 0 and add up to {told}, got {_told(found)}")
        return cls((int(size[0]), int(size[1])), found)


def edges_of(columns: np.ndarray, corner: tuple[int, int], height: int) -> np.ndarray:
    """Where the runs of bool `columns` (x, y) begin and end, in turn, in a mask of that height; `corner` is (x, y).

    Runs end with their column: where one goes on in the next, an index stands twice. Edges of columns that follow each
    other, one behind the other, are those of all of them.

    >>> edges_of(np.array([[0, 1, 1], [1, 1, 0]], dtype=bool), (2, 0), 3).tolist()
    [7, 9, 9, 11]
    """
    wide, high = columns.shape
    framed = np.zeros((wide, high + 2), dtype=bool)  # a 0 above and below each column: its runs begin and end
    framed[:, 1:-1] = columns
    column, row = np.divmod(np.flatnonzero(framed[:, 1:] != framed[:, :-1]), high + 1)
    return (column + corner[0]) * height + row + corner[1]


def union(masks: Sequence[RunLengths]) -> RunLengths:
    """The pixels that are 1 in any of the masks, which must be of one size, and one at least.

    >>> one, two = (RunLengths((1, 5), np.array(counts)) for counts in ([0, 2, 3], [1, 3, 1]))
    >>> union([one, two]).counts.tolist()
    [0, 4, 1]
    """
    edges = np.concatenate([mask.edges for mask in masks])
    steps = np.concatenate([1 - 2 * (np.arange(len(mask.edges)) % 2) for mask in masks])
    places, where = np.unique(edges, return_inverse=True)
    inside = np.cumsum(np.bincount(where, steps, minlength=len(places))) > 0
    changes = np.diff(inside, prepend=False)
    return RunLengths.between(places[changes], masks[0].size)


def compress(counts: np.ndarray) -> str:
    """Write counts as COCO's string.

    >>> compress(np.array([6, 1, 40, 4, 5, 4, 5, 4, 21]))
    '61X13mN000`0'
    """
    values = counts.astype(np.int64)
    values[3:] -= counts[1:-2]
    shifts = 5 * np.arange(GROUPS)
    rest = values[:, None] >> shifts  # (n, groups): what is left of a value from each group on
    bits = rest & 31
    signs = np.where(bits & 16, -1, 0)
    ends = (rest >> 5) == signs  # nothing but the sign is left behind this group
    last = ends.argmax(1)
    group = np.arange(GROUPS)
    letters = 48 + bits + 32 * (group < last[:, None])
    return letters[group <= last[:, None]].astype(np.uint8).tobytes().decode("ascii")


def expand(text: str | bytes) -> np.ndarray:
    """Read COCO's string: int64 counts. Raises VolvelleError for letters that are none, or a string that breaks off.

    >>> expand("61X13mN000`0").tolist()
    [6, 1, 40, 4, 5, 4, 5, 4, 21]
    """
    raw = text.encode("ascii", "replace") if isinstance(text, str) else text
    letters = np.frombuffer(raw, dtype=np.uint8).astype(np.int64) - 48
    if not len(letters):
        return letters
    bad = np.flatnonzero((letters < 0) | (letters > 63))
    if len(bad):
        raise VolvelleError(
            f"run lengths: letter {bad[0]} of the counts, {raw[bad[0] : bad[0] + 1]!r}, is none of COCO's"
        )
    last = (letters & 32) == 0
    if not last[-1]:
        raise VolvelleError(f"run lengths: the counts break off after {len(letters)} letters")
    number = np.concatenate(([0], np.cumsum(last)[:-1]))  # which value each letter belongs to
    begins = np.concatenate(([0], np.flatnonzero(last)[:-1] + 1))
    place = np.arange(len(letters)) - begins[number]
    if place.max() >= GROUPS:
        raise VolvelleError(f"run lengths: a count of more than {GROUPS} letters")
    values = np.zeros(len(begins), dtype=np.int64)
    np.add.at(values, number, (letters & 31) << 5 * place)
    ends = np.flatnonzero(last)
    negative = (letters[ends] & 16) != 0
    values[negative] -= np.int64(1) << 5 * (place[ends][negative] + 1)
    # Differences to the count two before: two sums that run side by side, behind the first count.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 0)


def _told(counts: np.ndarray) -> str:
    few = ", ".join(map(str, counts[:4].tolist()))
    return f"{few}{', …' if len(counts) > 4 else ''} with the sum {int(counts.sum())}"
