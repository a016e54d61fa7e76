"""Boxes drawn on pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, ImageFont

from volvelle.data.masks_labels import Colour

PANEL = 420
"""Pixels across a picture in a report, and the least that a picture with boxes is wide."""
WRONG: Colour = (230, 0, 60)
"""What is wrong: an object that was missed, a detection of nothing."""


@dataclass(frozen=True)
class Drawn:
    """One box as it is drawn: x1 y1 x2 y2 in the picture's pixels, a colour, a word at its corner, and how thick."""

    box: tuple[float, float, float, float]
    colour: Colour
    word: str = ""
    width: int = 2


def draw_boxes(image: Image.Image, boxes: Sequence[Drawn], *, letters: int = 12) -> Image.Image:
    """The picture with the boxes on it, later ones above; words of `letters` pixels stand inside the upper left corner.

    >>> drawn = draw_boxes(Image.new("RGB", (9, 9)), [Drawn((2, 2, 7, 7), (255, 0, 0), width=1)])
    >>> drawn.getpixel((2, 4)), drawn.getpixel((4, 4))
    ((255, 0, 0), (0, 0, 0))
    """
    picture = image.convert("RGB")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(letters)
    for one in boxes:
        x1, y1, x2, y2 = (round(value) for value in one.box)
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=one.colour, width=one.width)
    for one in boxes:
        if one.word:
            x, y = round(one.box[0]), round(one.box[1])
            draw.rectangle(draw.textbbox((x, y), one.word, font=font), fill=one.colour)
            draw.text((x, y), one.word, fill=_ink(one.colour), font=font)
    return picture


def resized_with_boxes(image: Image.Image, boxes: Sequence[Drawn], width: int, *, letters: int = 12) -> Image.Image:
    """The picture brought to a width, and the boxes on it: on a small picture words would hide what they name.

    >>> resized_with_boxes(Image.new("RGB", (50, 20)), [Drawn((10, 5, 40, 15), (255, 0, 0))], 200).getpixel((40, 40))
    (255, 0, 0)
    """
    height = max(1, round(image.height * width / image.width))
    across, down = width / image.width, height / image.height
    scaled = [
        replace(one, box=(one.box[0] * across, one.box[1] * down, one.box[2] * across, one.box[3] * down))
        for one in boxes
    ]
    picture = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)
    return draw_boxes(picture, scaled, letters=letters)


def _ink(ground: Colour) -> Colour:
    """Black or white, whichever is read more easily on that ground."""
    red, green, blue = ground
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)
