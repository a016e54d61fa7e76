"""What the report of a promptable model shows: masks as coloured veils with outlines, clicks and boxes on a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from volvelle.data.masks_labels import Colour
from volvelle.data.promptable_clicks import Click
from volvelle.train.segment_pictures import PANEL, png

FOR, AGAINST = (64, 220, 96), (236, 64, 64)
"""Clicks for the object, and against it."""
VEIL: Colour = (255, 176, 32)


def veiled(image: Image.Image, mask: np.ndarray, colour: Colour = VEIL, share: float = 0.45) -> Image.Image:
    """The picture with a mask bool (y, x) laid over it, its outline in full colour.

    >>> picture = veiled(Image.new("RGB", (5, 5)), np.pad(np.ones((3, 3), dtype=bool), 1), (200, 0, 0), 0.5)
    >>> picture.getpixel((2, 2)), picture.getpixel((1, 1)), picture.getpixel((0, 0))
    ((100, 0, 0), (200, 0, 0), (0, 0, 0))
    """
    pixels = np.asarray(image.convert("RGB")).astype(np.float64)
    inner = ndimage.binary_erosion(mask)
    weight = np.where(inner, share, np.where(mask, 1.0, 0.0))[..., None]
    return Image.fromarray(np.rint((1 - weight) * pixels + weight * np.array(colour)).astype(np.uint8))


def with_clicks(image: Image.Image, clicks: Sequence[Click], radius: int = 4) -> Image.Image:
    """The picture with its clicks as discs of `radius` pixels, green for the object and red against it."""
    picture = image.convert("RGB")
    draw = ImageDraw.Draw(picture)
    for click in clicks:
        box = (click.x - radius, click.y - radius, click.x + radius, click.y + radius)
        draw.ellipse(box, fill=FOR if click.label else AGAINST, outline=(255, 255, 255), width=max(1, radius // 3))
    return picture


def panels(pictures: Sequence[Image.Image]) -> bytes:
    """Pictures of one size side by side, as a PNG."""
    width = min(PANEL, pictures[0].width)
    height = max(1, round(width * pictures[0].height / pictures[0].width))
    joined = Image.new("RGB", (len(pictures) * (width + 4) - 4, height), (255, 255, 255))
    for number, picture in enumerate(pictures):
        joined.paste(
            picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (number * (width + 4), 0)
        )
    return png(joined.quantize(192, dither=Image.Dither.NONE))
