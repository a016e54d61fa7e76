"""Random views of pictures for training a classifier: crop, mirror, colour.

The numbers come from the generator that the loader gives for (seed, epoch, sample), so a view is the same in every run,
whoever reads it. The crop is cut out of the original and resized once.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageEnhance
from torch import Tensor

from volvelle.data.images import to_rgb, to_tensor
from volvelle.data.images_prepare import Preprocessing

RATIOS = (3 / 4, 4 / 3)
"""Least and greatest width : height of what is cut out."""


@dataclass(frozen=True)
class View:
    """What a training picture may be: its share of the area, mirrored or not, and how far its colours vary.

    `area` are the least and the largest share of the picture's area that a crop shows (Szegedy et al. 2015, section 6);
    `mirror` is the share of mirrored crops; brightness, contrast and saturation are each multiplied by 1 ± `colour`.
    """

    area: tuple[float, float] = (0.5, 1.0)
    mirror: float = 0.5
    colour: float = 0.2

    def __post_init__(self) -> None:
        low, high = self.area
        if not 0 < low <= high <= 1 or not 0 <= self.mirror <= 1 or not 0 <= self.colour < 1:
            raise ValueError(f"View: 0 < area <= 1, mirror in [0, 1] and colour in [0, 1) are wanted, got {self}")

    def __call__(self, image: Image.Image, how: Preprocessing, generator: random.Random) -> Tensor:
        """A crop of the picture as uint8 (3, size, size)."""
        picture = to_rgb(image)
        cut = crop_box(picture.size, self.area, generator)
        picture = picture.resize((how.size, how.size), how.resampling, box=cut)
        if generator.random() < self.mirror:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(vary_colour(picture, self.colour, generator))


def crop_box(
    size: tuple[int, int], area: tuple[float, float], generator: random.Random
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a random rectangle of that share of the area, of RATIOS where it fits.

    >>> crop_box((100, 50), (1.0, 1.0), random.Random(0))
    (0.0, 0.0, 100, 50)
    """
    width, height = size
    share = generator.uniform(*area)
    ratio = math.exp(generator.uniform(*map(math.log, RATIOS)))
    wide, high = math.sqrt(share * width * height * ratio), math.sqrt(share * width * height / ratio)
    if wide > width or high > height:  # too large in this shape: the picture's own shape always fits
        wide, high = width * math.sqrt(share), height * math.sqrt(share)
    left, top = generator.random() * (width - wide), generator.random() * (height - high)
    return left, top, min(width, left + wide), min(height, top + high)


def vary_colour(picture: Image.Image, amount: float, generator: random.Random) -> Image.Image:
    """Brightness, contrast and saturation, each multiplied by a random factor of 1 ± `amount`."""
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        factor = generator.uniform(1 - amount, 1 + amount)
        if amount:
            picture = change(picture).enhance(factor)
    return picture
