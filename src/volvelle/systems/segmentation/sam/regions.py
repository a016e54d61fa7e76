"""Small regions of a mask: holes are filled and islands dropped, on the run lengths, without the mask itself.

Kirillov et al. 2023, "Segment Anything", appendix B: components of fewer pixels than a limit, whether they are holes or
islands, come from noise. Pixels are connected by sides and corners. A column's run of equal pixels is a node of a
graph, runs of neighbouring columns that touch are joined: a mask of a million pixels has a few thousand nodes.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from volvelle.data.run_lengths import RunLengths


def clean_regions(mask: RunLengths, least: int) -> tuple[RunLengths, bool]:
    """Return the mask without holes, then without islands, of fewer than `least` pixels, and whether any was found.

    Where all islands are that small the largest stays.

    >>> rows = np.array([[1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 1], [1, 1, 1, 0, 0, 0]], dtype=bool)
    >>> cleaned, changed = clean_regions(RunLengths.of(rows), 2)
    >>> cleaned.mask().astype(int).tolist(), changed
    ([[1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]], True)
    """
    filled, holes = _without_small(mask, False, least)
    cleaned, islands = _without_small(filled, True, least)
    return cleaned, holes or islands


def _without_small(mask: RunLengths, kind: bool, least: int) -> tuple[RunLengths, bool]:
    """The mask with small components of 1 (`kind` True) or 0 turned over, and whether there are any."""
    begin, value = _segments(mask)
    length = np.diff(begin, append=mask.size[0] * mask.size[1])
    chosen = value == kind
    label = _components(begin[chosen], length[chosen], mask.size[0])
    area = np.bincount(label, length[chosen])
    small = area < least
    if not small.any():
        return mask, False
    if kind and small.all():
        small[area.argmax()] = False
    value[chosen] ^= small[label]
    return RunLengths.between(begin[np.diff(value, prepend=False)], mask.size), True


def _segments(mask: RunLengths) -> tuple[np.ndarray, np.ndarray]:
    """The mask's runs, cut at the columns' ends: where each begins, in rising order, and its value."""
    columns = np.arange(0, mask.size[0] * mask.size[1], mask.size[0])
    begin = np.union1d(mask.edges[mask.edges < mask.size[0] * mask.size[1]], columns)
    return begin, np.searchsorted(mask.edges, begin, side="right") % 2 == 1


def _components(begin: np.ndarray, length: np.ndarray, high: int) -> np.ndarray:
    """The number of the component that each segment belongs to, all of one value."""
    # Columns are moved two apart, so that segments of neighbouring columns touch where their rows do, corners too,
    # and no others do.
    column, row = np.divmod(begin, high)
    first = column * (high + 2) + row
    last = first + length
    low = np.searchsorted(last, first + high + 2, side="left")
    count = np.maximum(np.searchsorted(first, last + high + 2, side="right") - low, 0)
    one = np.repeat(np.arange(len(begin)), count)
    other = np.arange(len(one)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)
    joined = coo_array((np.ones(len(one), dtype=bool), (one, other)), shape=(len(begin), len(begin)))
    return connected_components(joined, directed=False)[1]
