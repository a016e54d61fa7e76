"""The objects of a picture that prompts are trained and measured on: pieces of a map, or a list of masks.

A map of class numbers has one object a connected piece; a map of object numbers one a number; a list of masks, which
may overlap, one a mask. What is void in a map is neither object nor ground: it is left out of losses and figures.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
from scipy import ndimage

from volvelle.data.masks_augment import Window
from volvelle.data.masks_labels import VOID
from volvelle.data.run_lengths import RunLengths


class Objects(Protocol):
    """The objects of one picture; masks are bool (y, x)."""

    @property
    def labels(self) -> Sequence[int]:
        """The class number of each."""
        ...

    @property
    def classes(self) -> np.ndarray | None:
        """The class number uint8 (y, x) of each pixel, VOID where there is none; None where only objects have one."""
        ...

    def __len__(self) -> int: ...

    def mask(self, index: int) -> np.ndarray:
        """The mask of one object."""
        ...

    def void(self) -> np.ndarray:
        """What of the picture is neither object nor ground."""
        ...

    def seen(self, window: Window, least: int) -> Objects:
        """The objects of a crop that show at least so many pixels in it (a list is not looked through for that)."""
        ...


class Pieces:
    """The connected pieces of each class in a map uint8 (y, x) of class numbers, those of `least` pixels or more.

    Pixels touch by their sides. `grounds` are classes that are no objects.

    >>> one = Pieces(np.array([[0, 1, 0, 1], [0, 1, 0, 255]], dtype=np.uint8), 2, grounds={0})
    >>> len(one), one.labels, one.mask(0).astype(int).tolist()
    (1, [1], [[0, 1, 0, 0], [0, 1, 0, 0]])
    """

    def __init__(self, classes: np.ndarray, least: int = 1, grounds: set[int] | frozenset[int] = frozenset()):
        self.classes, self.least, self.grounds = classes, least, grounds

    @cached_property
    def _found(self) -> tuple[np.ndarray, list[int]]:
        """Which piece each pixel belongs to, counted from 1, and the class of each; sought when first asked for."""
        numbers, labels = np.zeros(self.classes.shape, dtype=np.int32), list[int]()
        for label in np.flatnonzero(np.bincount(self.classes.reshape(-1), minlength=256) >= self.least).tolist():
            if label == VOID or label in self.grounds:
                continue
            where = self.classes == label
            rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
            part = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            pieces = np.empty(where[part].shape, dtype=np.int32)
            ndimage.label(where[part], output=pieces)
            count = int(pieces.max())
            kept = np.bincount(pieces.reshape(-1), minlength=count + 1) >= self.least
            kept[0] = False
            table = np.zeros(count + 1, dtype=np.int32)
            table[kept] = len(labels) + 1 + np.arange(kept.sum())
            numbers[part] += table[pieces]
            labels += [label] * int(kept.sum())
        return numbers, labels

    @property
    def labels(self) -> list[int]:
        """The class of each piece."""
        return self._found[1]

    def __len__(self) -> int:
        return len(self.labels)

    def mask(self, index: int) -> np.ndarray:
        """One piece."""
        return self._found[0] == index + 1

    def void(self) -> np.ndarray:
        """Where the map is void."""
        return self.classes == VOID

    def seen(self, window: Window, least: int) -> Pieces:
        """The pieces of the crop: what the crop cuts in two is two."""
        return Pieces(window.numbers(self.classes).numpy(), least, self.grounds)


class Listed:
    """Masks one by one, as run lengths; they may overlap. `nothing` (y, x) is what is void."""

    classes = None

    def __init__(self, masks: Sequence[RunLengths], labels: Sequence[int], nothing: np.ndarray):
        self.masks, self.labels, self.nothing = masks, list(labels), nothing

    def __len__(self) -> int:
        return len(self.masks)

    def mask(self, index: int) -> np.ndarray:
        """One mask."""
        return self.masks[index].mask()

    def void(self) -> np.ndarray:
        """What is void."""
        return self.nothing

    def seen(self, window: Window, least: int) -> _ListedSeen:
        """The masks whose boxes reach into the crop; each is cut out when it is asked for."""
        return _ListedSeen(self, window)


class _ListedSeen:
    """Those of a list of masks that a crop may show."""

    classes = None

    def __init__(self, whole: Listed, window: Window):
        self.whole, self.window = whole, window
        self.chosen = [i for i, one in enumerate(whole.masks) if _meets(one.box, window)]
        self.labels = [whole.labels[i] for i in self.chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def mask(self, index: int) -> np.ndarray:
        """What the crop shows of one mask; perhaps nothing."""
        mask = self.whole.mask(self.chosen[index]).astype(np.uint8)
        return self.window.numbers(mask, fill=0).numpy() > 0

    def void(self) -> np.ndarray:
        """What is void, and what lies outside the picture."""
        return self.window.numbers(self.whole.nothing.astype(np.uint8), fill=1).numpy() > 0

    def seen(self, window: Window, least: int) -> Objects:
        """A crop is cut once."""
        raise NotImplementedError("seen: these objects are a crop already")


def choose(objects: Objects, count: int, least: int, generator: random.Random) -> np.ndarray:
    """`count` of the objects with `least` pixels or more, drawn evenly: bool (count, y, x); (0, y, x) without any.

    No object is drawn twice before all were drawn once.
    """
    order = list(range(len(objects)))
    generator.shuffle(order)
    found = list[np.ndarray]()
    for index in order:
        mask = objects.mask(index)
        if int(mask.sum()) >= least:
            found.append(mask)
            if len(found) == count:
                break
    if not found:
        return np.zeros((0, *objects.void().shape), dtype=bool)
    return np.stack([found[i % len(found)] for i in range(count)])


def _meets(box: tuple[int, int, int, int], window: Window) -> bool:
    x1, y1, x2, y2 = box
    across, down = window.across, window.down
    return x1 < across.end and x2 > across.start and y1 < down.end and y2 > down.start
