"""Counts of what followed every gram of 1 … n tokens, in a text that grows and in texts that do not.

Shapes: N tokens in all texts, m tokens of a gram (1 … n).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

_KEPT = 8  # different next tokens of a gram that are remembered in fixed texts, the most frequent


class Followers(NamedTuple):
    """What followed a gram: how often in all, how many different tokens did, the most frequent with their counts."""

    total: int
    distinct: int
    nexts: dict[int, int]


NOBODY = Followers(0, 0, {})


class GrowingCounts:
    """Counts of one text, kept up as it grows: a new token costs n dictionary accesses.

    >>> counts = GrowingCounts(2)
    >>> counts.extend([1, 2, 3, 1, 2, 4])
    >>> counts.find((1, 2)), counts.find((9,))
    (Followers(total=2, distinct=2, nexts={3: 1, 4: 1}), Followers(total=0, distinct=0, nexts={}))
    """

    def __init__(self, n: int):
        self.n = n
        self.text: list[int] = []
        self._begin = 0
        self._nexts: dict[tuple[int, ...], dict[int, int]] = {}

    def extend(self, tokens: Iterable[int], *, apart: bool = False) -> None:
        """Append tokens; `apart` from what stands before them, as another text."""
        if apart:
            self._begin = len(self.text)
        for token in tokens:
            end = len(self.text)
            for m in range(1, min(self.n, end - self._begin) + 1):
                nexts = self._nexts.setdefault(tuple(self.text[end - m :]), {})
                nexts[token] = nexts.get(token, 0) + 1
            self.text.append(token)

    def find(self, gram: tuple[int, ...]) -> Followers:
        """What followed the gram."""
        nexts = self._nexts.get(gram)
        return NOBODY if nexts is None else Followers(sum(nexts.values()), len(nexts), nexts)


class FixedCounts:
    """Counts of texts that do not change, in sorted arrays: 20 to 40 bytes a token, and a lookup is a binary search.

    A gram is one number of n fields, as wide as the texts' own tokens need; where n of them do not fit into 63 bits,
    the longest grams are shorter.

    >>> FixedCounts([[1, 2, 3], [1, 2, 3], [1, 2, 4]], 2).find((1, 2))
    Followers(total=3, distinct=2, nexts={3: 2, 4: 1})
    """

    def __init__(self, texts: Sequence[Sequence[int]], n: int):
        flat = np.concatenate([np.asarray(text, dtype=np.int64) for text in texts] or [np.zeros(0, np.int64)])
        names, dense = np.unique(flat, return_inverse=True)
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        place = np.arange(len(flat)) - np.repeat(lengths.cumsum() - lengths, lengths)  # of each token in its text
        self._bits = max(len(names).bit_length(), 1)
        self.n = max(min(n, 63 // self._bits), 1)
        self._names = names
        self._numbers = {int(token): number for number, token in enumerate(names)}
        self._orders = [_Order(*self._grams(dense, place, m)) for m in range(1, self.n + 1)]
        self._found: dict[tuple[int, ...], Followers] = {}

    @property
    def largest(self) -> int:
        """The largest token of the texts, -1 when there is none."""
        return int(self._names[-1]) if len(self._names) else -1

    def find(self, gram: tuple[int, ...]) -> Followers:
        """What followed the gram; the most frequent tokens only."""
        found = self._found.get(gram)
        if found is None:
            found = self._found[gram] = self._find(gram)
        return found

    def _find(self, gram: tuple[int, ...]) -> Followers:
        number = 0
        for token in gram:
            dense = self._numbers.get(token)
            if dense is None or len(gram) > self.n:
                return NOBODY
            number = number << self._bits | dense
        total, distinct, nexts, counts = self._orders[len(gram) - 1].find(number)
        return Followers(total, distinct, {int(self._names[x]): int(c) for x, c in zip(nexts, counts, strict=True)})

    def _grams(self, dense: np.ndarray, place: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
        """The gram of m tokens before each token that has so many in its text, and that token."""
        at = np.flatnonzero(place >= m)
        grams = np.zeros(len(at), np.int64)
        for back in range(m, 0, -1):
            grams = grams << self._bits | dense[at - back]
        return grams, dense[at]


class _Order:
    """The grams of one length, sorted: of each the total, the number of different next tokens, the first of them."""

    def __init__(self, grams: np.ndarray, nexts: np.ndarray):
        order = np.lexsort((nexts, grams))
        grams, nexts = grams[order], nexts[order]
        first = np.flatnonzero(np.diff(grams, prepend=-1).astype(bool) | np.diff(nexts, prepend=-1).astype(bool))
        counts = np.diff(first, append=len(grams))
        grams, nexts = grams[first], nexts[first]  # one entry for each pair
        order = np.lexsort((nexts, -counts, grams))
        grams, nexts, counts = grams[order], nexts[order], counts[order]
        begin = np.flatnonzero(np.diff(grams, prepend=-1))
        self._grams = grams[begin]
        self._distinct = np.diff(begin, append=len(grams)).astype(np.int32)
        self._totals = (np.add.reduceat(counts, begin) if len(begin) else counts).astype(np.int32)
        rank = np.arange(len(grams)) - np.repeat(begin, self._distinct)
        kept = rank < _KEPT
        self._nexts, self._counts = nexts[kept].astype(np.int32), counts[kept].astype(np.int32)
        sizes = np.minimum(self._distinct, _KEPT)
        self._begin = (sizes.cumsum() - sizes).astype(np.int64)

    def find(self, gram: int) -> tuple[int, int, np.ndarray, np.ndarray]:
        at = int(np.searchsorted(self._grams, gram))
        if at == len(self._grams) or self._grams[at] != gram:
            return 0, 0, self._nexts[:0], self._counts[:0]
        distinct, begin = int(self._distinct[at]), int(self._begin[at])
        part = slice(begin, begin + min(distinct, _KEPT))
        return int(self._totals[at]), distinct, self._nexts[part], self._counts[part]
