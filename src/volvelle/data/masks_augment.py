"""Random crops of images with masks: scale, place, mirror and colour, the same for both and for any number of workers.

The numbers come from the generator that the loader gives for (seed, epoch, sample), so an augmented sample is the same
in every run, whoever reads it. The crop is cut out of the original and resized once: pixels that will be thrown away
are never resized. Images are resampled bilinearly, averaged when they shrink; masks take the nearest pixel. What lies
outside the image is filled with `FILL`, and void in the mask.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from volvelle.data.augment import vary_colour
from volvelle.data.images import to_tensor
from volvelle.data.masks import MaskFolder
from volvelle.data.masks_labels import VOID

FILL = 124
"""Grey near the mean of photographs."""


@dataclass(frozen=True)
class Augmentation:
    """What a training crop may be: its size in pixels (height, width), and how far it varies.

    `scale` are the least and the largest magnification, drawn evenly on a logarithmic axis; `mirror` is the share of
    mirrored crops; brightness, contrast and saturation are each multiplied by 1 ± `colour`.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.75, 1.75)
    mirror: float = 0.5
    colour: float = 0.3

    def __post_init__(self) -> None:
        low, high = self.scale
        if min(self.size) < 1 or not 0 < low <= high or not 0 <= self.mirror <= 1 or not 0 <= self.colour < 1:
            raise ValueError(
                f"Augmentation: size >= 1, 0 < scale, mirror in [0, 1] and colour in [0, 1) are wanted, got {self}"
            )

    def window(self, image: Image.Image, generator: random.Random) -> Window:
        """A random crop of the picture."""
        low, high = (math.log(value) for value in self.scale)
        scale = math.exp(generator.uniform(low, high))
        across = _place(image.width, self.size[1], scale, generator)
        down = _place(image.height, self.size[0], scale, generator)
        return Window(self.size, across, down, generator.random() < self.mirror)

    def picture(self, image: Image.Image, window: Window, generator: random.Random) -> Tensor:
        """What the window shows of the picture, in other colours: uint8 (3, height, width)."""
        return window.place(vary_colour(window.cut(image, Image.Resampling.BILINEAR), self.colour, generator), FILL)

    def __call__(self, image: Image.Image, mask: np.ndarray, generator: random.Random) -> tuple[Tensor, Tensor]:
        """A crop: uint8 (3, height, width) and its class numbers uint8 (height, width)."""
        window = self.window(image, generator)
        return self.picture(image, window, generator), window.numbers(mask)


@dataclass(frozen=True)
class _Place:
    """Along one axis: what is cut out of the image, and how many pixels of the crop it fills, from which on."""

    start: float
    end: float
    offset: int
    length: int


@dataclass(frozen=True)
class Window:
    """A crop of a picture: what is cut out along each axis, the crop's size (height, width), and whether mirrored."""

    size: tuple[int, int]
    across: _Place
    down: _Place
    mirrored: bool

    @property
    def scale(self) -> float:
        """How many pixels of the crop a pixel of the picture is wide."""
        return self.across.length / (self.across.end - self.across.start)

    def cut(self, image: Image.Image, resampling: Image.Resampling) -> Image.Image:
        """The part of the picture, resized and perhaps mirrored."""
        box = (self.across.start, self.down.start, self.across.end, self.down.end)
        part = image.resize((self.across.length, self.down.length), resampling, box=box)
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else part

    def place(self, part: Image.Image, fill: int) -> Tensor:
        """What `cut` gave, where it lies in the crop: uint8 (c, height, width), `fill` around it."""
        pixels = to_tensor(part)
        whole = torch.full((len(pixels), *self.size), fill, dtype=torch.uint8)
        down, across = self.down, self.across
        whole[:, down.offset : down.offset + down.length, across.offset : across.offset + across.length] = pixels
        return whole

    def numbers(self, mask: np.ndarray, fill: int = VOID) -> Tensor:
        """The crop of a map of numbers uint8 (y, x), by its nearest pixels: (height, width)."""
        return self.place(self.cut(Image.fromarray(mask), Image.Resampling.NEAREST), fill)[0]


def _place(size: int, wanted: int, scale: float, generator: random.Random) -> _Place:
    """A window of `wanted` pixels after scaling, somewhere in the image; all of the image where it is smaller."""
    window, at = wanted / scale, generator.random()
    if window <= size:
        start = at * (size - window)
        return _Place(start, start + window, 0, wanted)
    length = max(1, min(wanted, round(size * scale)))
    return _Place(0, size, round(at * (wanted - length)), length)


class Augmented:
    """A folder of images with masks whose items are random crops, for training (`draw` is what the loader asks)."""

    def __init__(self, folder: MaskFolder, augmentation: Augmentation):
        self.folder, self.augmentation = folder, augmentation

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.draw(index, random.Random(index))

    def draw(self, index: int, generator: random.Random) -> tuple[Tensor, Tensor]:
        """Sample `index` with its chances taken from the generator."""
        return self.augmentation(*self.folder[index], generator)

    def source(self, index: int) -> str:
        """The image's path."""
        return self.folder.source(index)


class Whole:
    """A folder of images with masks as they are, for measuring: uint8 (3, y, x) and (y, x)."""

    def __init__(self, folder: MaskFolder):
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.folder[index]
        return to_tensor(image), torch.from_numpy(mask)

    def source(self, index: int) -> str:
        """The image's path."""
        return self.folder.source(index)


def collate_masks(items: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Stack samples of one size: images (b, 3, y, x) and masks (b, y, x), both uint8."""
    images, masks = zip(*items, strict=True)
    return {"images": torch.stack(images), "masks": torch.stack(masks)}


def split_in_runs(count: int, share: float, seed: int, run: int = 8) -> tuple[list[int], list[int]]:
    """Numbers to train on and numbers to hold out, about `share` of them, in runs of neighbours.

    Frames of a film lie beside each other and are nearly the same: held-out frames between trained ones would be
    measured too well. Both sides get at least one number.

    >>> split_in_runs(10, 0.2, seed=0, run=2)
    ([0, 1, 4, 5, 6, 7, 8, 9], [2, 3])
    """
    if count < 2:
        raise ValueError(f"split_in_runs: needs at least 2 samples, got {count}")
    wanted = min(count - 1, max(1, round(share * count)))
    run = min(run, wanted)
    runs = [range(at, min(at + run, count)) for at in range(0, count, run)]
    random.Random(f"runs/{seed}").shuffle(runs)
    held = sorted([i for block in runs for i in block][:wanted])
    return [i for i in range(count) if i not in set(held)], held
