"""Where `everything` looks: windows of a picture that overlap, layer by layer, and a grid of points in each.

Kirillov et al. 2023, "Segment Anything", appendix B.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from volvelle.systems.segmentation.sam.options import EverythingOptions


@dataclass(frozen=True)
class Crop:
    """A window of a picture: its corners x1 y1 x2 y2 in pixels, and how many points along a side it is asked at."""

    box: tuple[int, int, int, int]
    points: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.box[3] - self.box[1], self.box[2] - self.box[0]

    def grid(self) -> np.ndarray:
        """The points (points^2, 2), x y in pixels of the crop, in rows: the middles of as many equal fields."""
        middles = np.linspace(0.5 / self.points, 1 - 0.5 / self.points, self.points)
        x, y = np.meshgrid(middles, middles)
        return np.stack((x, y), axis=-1).reshape(-1, 2) * self.size[::-1]


def crops(size: tuple[int, int], options: EverythingOptions) -> Iterator[Crop]:
    """The whole picture (height, width), then the crops of each layer, column by column, none of them empty.

    >>> some = crops((60, 90), EverythingOptions(points=8, crop_layers=1, crop_overlap=0.2, crop_shrink=2))
    >>> [(crop.box, crop.points) for crop in some][:3]
    [((0, 0, 90, 60), 8), ((0, 0, 51, 36), 4), ((0, 24, 51, 60), 4)]
    """
    height, width = size
    yield Crop((0, 0, width, height), options.points)
    for layer in range(1, options.crop_layers + 1):
        count = 2**layer
        overlap = int(options.crop_overlap * min(size) * (2 / count))
        wide, high = (math.ceil((side + overlap * (count - 1)) / count) for side in (width, height))
        for column, row in itertools.product(range(count), repeat=2):
            x, y = (wide - overlap) * column, (high - overlap) * row
            box = (x, y, min(x + wide, width), min(y + high, height))
            if x < box[2] and y < box[3]:  # of a tiny or flat picture some crops would begin behind its end
                yield Crop(box, int(options.points / options.crop_shrink**layer))
