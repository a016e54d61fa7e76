"""What a segmenter's report shows: the confusion matrix, and pictures beside what was seen in them."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from volvelle.data.masks_labels import VOID, Colour, voc_colour

PANEL = 260
"""The widest that one picture of a row is drawn, in pixels."""
CELL, LETTER = 34, 6.6


def painted(labels: np.ndarray, colours: Sequence[Colour]) -> np.ndarray:
    """Class numbers (y, x) as RGB uint8 (y, x, 3); void is black.

    >>> painted(np.array([[0, 255]]), [(9, 9, 9)]).tolist()
    [[[9, 9, 9], [0, 0, 0]]]
    """
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(colours)] = colours
    return table[labels]


def overlay(image: Image.Image, labels: np.ndarray, colours: Sequence[Colour], share: float = 0.55) -> Image.Image:
    """The picture with its classes laid over it; `share` is how much of the colour shows. Void stays as it is."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float64)
    mixed = (1 - share) * pixels + share * painted(labels, colours)
    known = (labels != VOID)[..., None]
    return Image.fromarray(np.rint(np.where(known, mixed, pixels)).astype(np.uint8))


def colours_of(classes: Sequence[str], colours: Sequence[Colour]) -> list[Colour]:
    """The colours to draw the classes in: their own, else VOC's."""
    return list(colours) if colours else [voc_colour(number + 1) for number in range(len(classes))]


def row_of_panels(image: Image.Image, truth: np.ndarray | None, seen: np.ndarray, colours: Sequence[Colour]) -> bytes:
    """A PNG: the picture, what is there, what was seen, and (white) where they differ; without truth, two of them."""
    panels = [image.convert("RGB")]
    if truth is not None:
        panels.append(overlay(image, truth, colours))
    panels.append(overlay(image, seen, colours))
    if truth is not None:
        wrong = (truth != VOID) & (truth != seen)
        panels.append(Image.fromarray(np.where(wrong, 255, np.where(truth == VOID, 96, 0)).astype(np.uint8)))
    width = min(PANEL, image.width)
    height = max(1, round(width * image.height / image.width))
    joined = Image.new("RGB", (len(panels) * (width + 4) - 4, height), (255, 255, 255))
    for number, panel in enumerate(panels):
        joined.paste(panel.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (number * (width + 4), 0))
    # 128 colours are a third of the bytes, and hardly seen in pictures of this size.
    return png(joined.quantize(128, dither=Image.Dither.NONE))


def png(image: Image.Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def legend(classes: Sequence[str], colours: Sequence[Colour]) -> str:
    """The classes beside their colours, as HTML."""
    entries = "".join(
        f'<span style="display:inline-block;margin:0 1rem .3rem 0"><span style="display:inline-block;width:.9em;'
        f'height:.9em;border-radius:.2em;margin-right:.4em;background:rgb{tuple(map(int, colour))}"></span>'
        f"{html.escape(name)}</span>"
        for name, colour in zip(classes, colours, strict=True)
    )
    return f"<p>{entries}</p>"


def confusion_picture(matrix: Tensor, classes: Sequence[str]) -> str:
    """An SVG of a confusion matrix (k, k): of the pixels of each row's class, the share predicted as each column's.

    Cells of half a percent and more carry their share; a class without pixels has an empty row.
    """
    k = len(classes)
    total = matrix.sum(1, keepdim=True)
    shares = (matrix.double() / total.clamp(min=1)).tolist()
    left = round(LETTER * max(len(name) for name in classes)) + 16
    side = k * CELL
    parts = []
    for i, name in enumerate(classes):
        at = left + i * CELL + CELL / 2
        parts.append(
            f'<text x="{left - 8}" y="{left + i * CELL + CELL / 2 + 4}" text-anchor="end">{html.escape(name)}</text>'
        )
        turned = f'transform="rotate(-60 {at} {left - 8})"'
        parts.append(f'<text x="{at}" y="{left - 8}" {turned}>{html.escape(name)}</text>')
        for j, share in enumerate(shares[i]):
            x, y = left + j * CELL, left + i * CELL
            colour = "var(--s0)" if i == j else "var(--s1)"
            tip = html.escape(f"{name} seen as {classes[j]}: {share:.2%} ({int(matrix[i, j]):,} pixels)")
            parts.append(
                f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{colour}" '
                f'fill-opacity="{min(1.0, share**0.5):.3f}"><title>{tip}</title></rect>'
            )
            if share >= 0.005:
                number = "100" if share >= 0.995 else f"{100 * share:.0f}"
                parts.append(
                    f'<text x="{x + CELL / 2}" y="{y + CELL / 2 + 4}" text-anchor="middle" '
                    f'style="fill:var(--ink)">{number}</text>'
                )
    width, height = left + side + left // 2, left + side + 4
    label = "confusion matrix: rows are the classes, columns what was predicted"
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
