"""How a picture becomes a text that a language model writes: what it shows, a sign to begin, its codes row by row.

    [class 7] [begin] [code] [code] … one for each place of the grid, in raster order

| ids | what they are |
|---|---|
| 0 … codes - 1 | the codec's codes, the only ids that are written |
| codes | begin: the picture follows |
| codes + 1 | nothing: stands where a picture's class or caption is not said |
| codes + 2 … | classes, or the words of captions |

The table ends at a multiple of 16, which kernels like; the ids that fill it up mean nothing. No torch in this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from volvelle.errors import UsageError, VolvelleError, did_you_mean

ROUND = 16
"""The vocabulary is a multiple of this."""


@dataclass(frozen=True)
class Layout:
    """The grid of `rows` x `columns` codes out of `codes` different ones, and what may be said before it.

    That is nothing, one of `classes`, or a caption of at most `caption` out of `words` different tokens.

    >>> layout = Layout(codes=256, rows=7, columns=7, classes=("coat", "bag"))
    >>> layout.prompt(1), layout.prompt(None), layout.vocabulary, layout.context
    ([259, 256], [257, 256], 272, 51)
    """

    codes: int
    rows: int
    columns: int
    classes: tuple[str, ...] = ()
    words: int = 0
    caption: int = 0

    def __post_init__(self) -> None:
        if min(self.codes, self.rows, self.columns) < 1 or min(self.words, self.caption) < 0:
            raise ValueError(f"Layout: codes, rows and columns must be at least 1, words and caption 0, got {self}")
        if bool(self.words) != bool(self.caption) or (self.classes and self.words):
            raise ValueError(f"Layout: classes, or words and the length of captions, or neither; got {self}")

    @property
    def begin(self) -> int:
        """The id in front of the first code."""
        return self.codes

    @property
    def nothing(self) -> int:
        """The id that stands for an unknown class or an empty caption."""
        return self.codes + 1

    @property
    def first(self) -> int:
        """The id of the first class or word."""
        return self.codes + 2

    @property
    def vocabulary(self) -> int:
        """The number of ids."""
        return -(-(self.first + len(self.classes) + self.words) // ROUND) * ROUND

    @property
    def said(self) -> int:
        """The most ids in front of `begin`."""
        return self.caption or (1 if self.classes else 0)

    @property
    def picture(self) -> int:
        """The codes of a picture."""
        return self.rows * self.columns

    @property
    def context(self) -> int:
        """The longest text."""
        return self.said + 1 + self.picture

    def prompt(self, shows: int | Sequence[int] | None = None) -> list[int]:
        """The ids before the codes of a picture that `shows` a class, a caption's tokens, or what is not known.

        Raises VolvelleError for what this layout has no place for.
        """
        if shows is None or (not isinstance(shows, int) and not len(shows)):
            return [self.nothing, self.begin] if self.said else [self.begin]
        if isinstance(shows, int):
            if not 0 <= shows < len(self.classes):
                raise VolvelleError(f"class {shows}: there are {len(self.classes)}, from 0 on")
            return [self.first + shows, self.begin]
        if len(shows) > self.caption:
            raise VolvelleError(f"a caption of {len(shows)} tokens: the longest that was learnt has {self.caption}")
        if not 0 <= min(shows) <= max(shows) < self.words:
            raise VolvelleError(f"a caption with token {max(shows)}: there are {self.words} words")
        return [*(self.first + word for word in shows), self.begin]

    def number(self, name: str) -> int:
        """The class of that name, or of that number. Raises UsageError for another, with one that is close."""
        names = [known.lower() for known in self.classes]
        if name.lower() in names:
            return names.index(name.lower())
        if name.isdecimal() and int(name) < len(names):
            return int(name)
        tip = did_you_mean(name, self.classes) or f"one of {', '.join(self.classes[:12])}"
        raise UsageError(f"class={name}: no such class", tip=tip if self.classes else "it was trained without classes")

    def to_dict(self) -> dict[str, Any]:
        """The layout as plain data."""
        return asdict(self) | {"classes": list(self.classes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Layout:
        """Undo `to_dict`."""
        return cls(**{**values, "classes": tuple(values.get("classes", ()))})
