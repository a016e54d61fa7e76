"""Many pictures on one sheet."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from volvelle.data.images import to_image


def sheet(pictures: Tensor, *, columns: int | None = None, gap: int = 2, least: int = 1) -> Image.Image:
    """Lay pictures uint8 (n, 1 or 3, y, x) side by side, row after row, on white; without `columns` about square.

    Small ones are enlarged by a whole number, pixel by pixel, until their longer side has at least `least` pixels.

    >>> sheet(torch.zeros(5, 1, 4, 4, dtype=torch.uint8), columns=3).size
    (16, 10)
    """
    if pictures.ndim != 4 or not len(pictures):
        raise ValueError(f"sheet: wanted pictures (n, c, y, x), at least one, got shape {tuple(pictures.shape)}")
    factor = max(1, -(-least // max(pictures.shape[-2:])))
    shown = pictures.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    n, c, y, x = shown.shape
    across = min(n, columns or -int(-(n**0.5) // 1))
    down = -(-n // across)
    whole = torch.full((c, down * (y + gap) - gap, across * (x + gap) - gap), 255, dtype=torch.uint8)
    for number, picture in enumerate(shown):
        row, column = divmod(number, across)
        whole[:, row * (y + gap) : row * (y + gap) + y, column * (x + gap) : column * (x + gap) + x] = picture
    return to_image(whole)
