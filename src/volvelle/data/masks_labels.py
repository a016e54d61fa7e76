"""What the values in a mask file mean: class numbers, palette entries, or colours; and which of them are void.

A mask becomes an array of class numbers, 0 … k - 1, with `VOID` (255) where nothing is to be learnt or measured:

| what the file holds | what is read |
|---|---|
| L, 16-bit grey, P (palette), 1 bit | the stored numbers; a palette's colours are only for looking at it |
| RGB, RGBA whose three channels agree | that number |
| RGB, RGBA in colours of a known table | the number of the colour: of classes.txt, VOC or CamVid |
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from volvelle.errors import UsageError, VolvelleError

VOID = 255
UNKNOWN = 254
"""What a value that means nothing becomes; 254 classes are the most that a mask of bytes can name."""
Colour = tuple[int, int, int]
TABLES = ("classes.txt", "labels.txt", "label_colors.txt")
"""Files that name a folder's classes: a name a line, with three numbers (its colour) before or behind, if at all."""


def voc_colour(number: int) -> Colour:
    """The colour of class `number` in VOC's palette: its bits, dealt to red, green and blue from the top down.

    >>> voc_colour(1), voc_colour(15)
    ((128, 0, 0), (192, 128, 128))
    """
    channels = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            channels[channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
    return channels[0], channels[1], channels[2]


VOC_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip
CAMVID_NAMES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
"""The 11 classes that papers report, in the numbering of SegNet's masks; 11 is void there."""
CAMVID_COLOURS: tuple[Colour, ...] = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
    (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip
CAMVID_GROUPS: dict[Colour, int] = {
    (128, 128, 128): 0, (0, 128, 64): 1, (128, 0, 0): 1, (64, 192, 0): 1, (64, 0, 64): 1, (192, 0, 128): 1,
    (192, 192, 128): 2, (0, 0, 64): 2, (128, 64, 128): 3, (128, 0, 192): 3, (192, 0, 64): 3, (0, 0, 192): 4,
    (64, 192, 128): 4, (128, 128, 192): 4, (60, 40, 222): 4, (128, 128, 0): 5, (192, 192, 0): 5, (192, 128, 128): 6,
    (128, 128, 64): 6, (0, 64, 64): 6, (64, 64, 128): 7, (64, 0, 128): 8, (64, 128, 192): 8, (192, 128, 192): 8,
    (192, 64, 128): 8, (128, 64, 64): 8, (64, 64, 0): 9, (192, 128, 64): 9, (64, 0, 192): 9, (64, 128, 64): 9,
    (0, 128, 192): 10, (192, 0, 192): 10, (0, 0, 0): VOID,
}  # fmt: skip
"""CamVid's 32 colours (Brostow et al. 2009) in the usual 11 groups."""


@dataclass(frozen=True)
class Labels:
    """The classes of a data set: names, colours to draw them in, file values that are void, colours that are classes.

    `void` lists values beside 255. A void value below others leaves no gap: the classes behind it move down.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...] = ()
    void: tuple[int, ...] = ()
    by_colour: tuple[tuple[Colour, int], ...] = ()
    binary: bool = False
    """Whether the files hold 0 and 255 alone, and 255 is class 1."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) <= UNKNOWN:
            raise UsageError(f"masks: 1 to {UNKNOWN} classes can be told apart, got {len(self.names)}")

    def __len__(self) -> int:
        return len(self.names)

    def colour(self, number: int) -> Colour:
        """What class `number` is drawn in; void is black."""
        if number >= len(self.names):
            return 0, 0, 0
        return self.colours[number] if self.colours else voc_colour(number + 1)

    @cached_property
    def table(self) -> np.ndarray:
        """(256,) uint8: file value -> class number, `VOID` or `UNKNOWN`."""
        table = np.full(256, UNKNOWN, dtype=np.uint8)
        if self.binary:
            table[0], table[255] = 0, 1
            return table
        values = [value for value in range(256) if value not in self.void]
        for number, value in enumerate(values[: len(self.names)]):
            table[value] = number
        for value in (*self.void, VOID):
            table[value] = VOID
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Labels:
        """Undo `to_json`.

        >>> Labels.from_json(Labels(("a",), ((1, 2, 3),)).to_json()).colour(0)
        (1, 2, 3)
        """

        def frozen(value: Any) -> Any:
            return tuple(frozen(item) for item in value) if isinstance(value, list | tuple) else value

        return cls(**{name: frozen(value) for name, value in values.items()})

    def decode(self, values: np.ndarray) -> np.ndarray:
        """Class numbers of file values (y, x). Raises VolvelleError that lists the values that are no class."""
        found = self.table[values]
        if (found == UNKNOWN).any():
            unknown = np.unique(values[found == UNKNOWN]).tolist()
            raise VolvelleError(
                f"has ids that are no class: {shortened(unknown)} (classes are 0 … {len(self.names) - 1})",
                tip="name all classes in classes.txt, or say void=ID for one that is to be left out",
            )
        return found


def shortened(values: list) -> str:
    """The first ten of them.

    >>> shortened([1, 2])
    '1, 2'
    """
    return ", ".join(map(str, values[:10])) + (f" and {len(values) - 10} more" if len(values) > 10 else "")


def stored_values(mask: Image.Image, by_colour: tuple[tuple[Colour, int], ...] = ()) -> np.ndarray:
    """The numbers (y, x) uint8 that a mask file stands for, before any are void. Raises VolvelleError with the reason.

    `by_colour` is asked first for masks in colour, then the tables of VOC and CamVid.
    """
    if mask.mode in ("L", "P"):
        return np.asarray(mask)
    if mask.mode == "1":
        return np.asarray(mask).astype(np.uint8)
    if mask.mode.startswith("I"):
        wide = np.asarray(mask)
        if wide.size and (wide.min() < 0 or wide.max() > 255):
            odd = np.unique(wide[(wide < 0) | (wide > 255)]).tolist()
            raise VolvelleError(f"has ids that are no class: {shortened(odd)} (at most 254 classes can be told apart)")
        return wide.astype(np.uint8)
    if mask.mode == "LA":
        return np.asarray(mask)[..., 0]
    if mask.mode not in ("RGB", "RGBA"):
        raise VolvelleError(f"mode {mask.mode} is no mask", tip="save class numbers as an 8-bit grey PNG")
    rgb = np.asarray(mask)[..., :3]
    packed = (rgb.astype(np.int32) << np.array([16, 8, 0])).sum(-1)
    colours, where = np.unique(packed, return_inverse=True)
    numbers = _numbers([(int(c) >> 16, int(c) >> 8 & 255, int(c) & 255) for c in colours], by_colour)
    return np.array(numbers, dtype=np.uint8)[where].reshape(packed.shape)


def _numbers(colours: list[Colour], by_colour: tuple[tuple[Colour, int], ...]) -> list[int]:
    """One number a colour, by the first table that knows them all."""
    if not by_colour and all(r == g == b for r, g, b in colours):
        return [r for r, _, _ in colours]
    voc = {voc_colour(number): number for number in range(len(VOC_NAMES))} | {(224, 224, 192): VOID}
    known = dict(by_colour)
    fitting = [t for t in ([known] if known else [voc, CAMVID_GROUPS]) if all(colour in t for colour in colours)]
    readings = [[table[colour] for colour in colours] for table in fitting]
    if len(readings) == 2 and readings[0] != readings[1]:
        raise VolvelleError(
            f"is in colours that are VOC's and CamVid's alike: {shortened(colours)}",
            tip="write the classes into classes.txt, a line each: NAME R G B",
        )
    if readings:
        return readings[0]
    best = known or max(voc, CAMVID_GROUPS, key=lambda table: sum(c in table for c in colours))
    strange = [c for c in colours if c not in best]
    raise VolvelleError(
        f"has {len(strange)} colours that are no class: {shortened(strange)}",
        tip="write the classes into classes.txt, a line each: NAME R G B",
    )


def read_table(folder: Path) -> Labels | None:
    """The classes that a folder's classes.txt names, or None when it has none. Raises VolvelleError for a bad line."""
    file = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if file is None:
        return None
    names, colours = list[str](), list[Colour]()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        words = line.replace(",", " ").split()
        if not words or line.startswith("#"):
            continue
        name, colour = _row(words)
        if not name or (colours and colour is None) or (names and not colours and colour):
            raise VolvelleError(f"{file}:{number}: wanted a name, and R G B for all or for none, got {line.strip()!r}")
        names.append(name)
        colours += [colour] if colour else []
    if not names or len(set(names)) < len(names):
        raise VolvelleError(f"{file}: names no class" if not names else f"{file}: a class is named twice")
    kept = [i for i, name in enumerate(names) if not colours or name.lower() not in ("void", "unlabelled", "unlabeled")]
    by_colour = tuple((colour, kept.index(i) if i in kept else VOID) for i, colour in enumerate(colours))
    shown = tuple(colours[i] for i in kept) if colours else ()
    return Labels(tuple(names[i] for i in kept), shown, by_colour=by_colour)


def _row(words: list[str]) -> tuple[str, Colour | None]:
    """A line's name, and its colour where three numbers stand before or behind the name."""
    for at in (slice(0, 3), slice(-3, None)):
        numbers = words[at]
        if len(words) > 3 and all(word.isdigit() and int(word) < 256 for word in numbers):
            rest = words[3:] if at.start == 0 else words[:-3]
            r, g, b = map(int, numbers)
            return " ".join(rest), (r, g, b)
    return " ".join(words), None
