"""Views of pictures with boxes: as they are, and random crops of them for training; and batches of views.

The numbers come from the generator that the loader gives for (seed, epoch, sample), so a view is the same in every run,
whoever reads it. A crop is cut out of the original and resized once. No mosaics and no pictures pasted into each other:
what is trained on looks like what will be seen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from volvelle.data.augment import vary_colour
from volvelle.data.boxes import Boxes, BoxFolder
from volvelle.data.images import to_rgb, to_tensor
from volvelle.data.masks_augment import FILL


class View(NamedTuple):
    """A picture uint8 (3, y, x) and its objects in its pixels: boxes (m, 4) fp32, labels (m,), ignored (m,) bool."""

    pixels: Tensor
    boxes: Tensor
    labels: Tensor
    ignored: Tensor


@dataclass(frozen=True)
class Fit:
    """How pictures are brought to a detector's size: to squares of `size` pixels, or to that longer side.

    >>> Fit(320).shape(640, 480), Fit(320, stretch=False).shape(640, 480)
    ((320, 320), (320, 240))
    """

    size: int = 320
    stretch: bool = True

    def shape(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of a picture of that width and height afterwards."""
        if self.stretch:
            return self.size, self.size
        factor = self.size / max(width, height)
        return max(1, round(width * factor)), max(1, round(height * factor))

    def prepare(self, image: Image.Image) -> Tensor:
        """The whole picture as uint8 (3, y, x)."""
        return to_tensor(to_rgb(image).resize(self.shape(*image.size), Image.Resampling.BILINEAR))

    def boxes(self, corners: Tensor, width: int, height: int) -> Tensor:
        """Boxes (k, 4) of a picture of that size, in the pixels of the prepared one."""
        return corners * self._factors(corners, width, height)

    def back(self, corners: Tensor, width: int, height: int) -> Tensor:
        """Undo `boxes`."""
        return corners / self._factors(corners, width, height)

    def _factors(self, like: Tensor, width: int, height: int) -> Tensor:
        wide, high = self.shape(width, height)
        return like.new_tensor([wide / width, high / height] * 2)


@dataclass(frozen=True)
class BoxAugmentation:
    """What a training view may be: how much of the picture it shows, turned how, and how far its colours vary.

    `crop` are the least and the largest share of the picture's sides that a view shows, drawn evenly on a logarithmic
    axis; above 1 the whole picture lies somewhere on a grey ground. `mirror` and `upside_down` are the shares of views
    that are mirrored along each axis; brightness, contrast and saturation are each multiplied by 1 ± `colour`.

    An object stays when its centre does; one that is cut off further is `ignored`, so that its rest is not background.
    """

    crop: tuple[float, float] = (0.6, 1.25)
    mirror: float = 0.5
    upside_down: float = 0.0
    colour: float = 0.2

    def __post_init__(self) -> None:
        low, high = self.crop
        shares = (self.mirror, self.upside_down)
        if not 0 < low <= high or not all(0 <= share <= 1 for share in shares) or not 0 <= self.colour < 1:
            raise ValueError(
                "BoxAugmentation: 0 < crop, mirror and upside_down in [0, 1] and colour in [0, 1) are wanted, "
                f"got {self}"
            )

    def __call__(self, image: Image.Image, boxes: Boxes, fit: Fit, generator: random.Random) -> View:
        """A view of the size that `fit` gives the whole picture."""
        share = math.exp(generator.uniform(*(math.log(value) for value in self.crop)))
        at = generator.random(), generator.random()
        turned = generator.random() < self.mirror, generator.random() < self.upside_down
        wide, high = fit.shape(*image.size)
        # The window in the picture's pixels: inside it, or around it.
        left, top = (place * (1 - share) * side for place, side in zip(at, image.size, strict=True))
        factors = wide / (share * image.width), high / (share * image.height)
        picture = _cut(image, (left, top), share, (wide, high), factors)
        corners = boxes.corners.clone()
        corners[:, 0::2] = (corners[:, 0::2] - left) * factors[0]
        corners[:, 1::2] = (corners[:, 1::2] - top) * factors[1]
        if turned[0]:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            corners = torch.stack((wide - corners[:, 2], corners[:, 1], wide - corners[:, 0], corners[:, 3]), 1)
        if turned[1]:
            picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
            corners = torch.stack((corners[:, 0], high - corners[:, 3], corners[:, 2], high - corners[:, 1]), 1)
        pixels = to_tensor(vary_colour(picture, self.colour, generator))
        return View(pixels, *_inside(corners, boxes, wide, high))


def _cut(
    image: Image.Image, start: tuple[float, float], share: float, size: tuple[int, int], factors: tuple[float, float]
) -> Image.Image:
    """The window of `share` of the picture's sides that begins at `start`, as a picture of `size`."""
    (left, top), (wide, high) = start, size
    if share <= 1:
        window = (
            left,
            top,
            min(image.width, left + share * image.width),
            min(image.height, top + share * image.height),
        )
        return image.resize(size, Image.Resampling.BILINEAR, box=window)
    ground = Image.new("RGB", size, (FILL, FILL, FILL))
    inside = max(1, min(wide, round(wide / share))), max(1, min(high, round(high / share)))
    place = round(-left * factors[0]), round(-top * factors[1])
    ground.paste(image.resize(inside, Image.Resampling.BILINEAR), place)
    return ground


def _inside(corners: Tensor, boxes: Boxes, wide: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes cut off at the edges, labels and ignored; without those of which less than a pixel is left."""
    limit = corners.new_tensor([wide, high])
    centres = (corners[:, :2] + corners[:, 2:]) / 2
    cut = torch.minimum(corners.clamp(min=0), limit.repeat(2))
    there = ((cut[:, 2:] - cut[:, :2]) >= 1).all(1)
    off = ~((centres >= 0) & (centres < limit)).all(1)
    return cut[there], boxes.labels[there], (boxes.ignored | off)[there]


class Views:
    """Pictures with boxes whose items are random views, for training (`draw` is what the loader asks)."""

    def __init__(self, folder: BoxFolder, fit: Fit, augmentation: BoxAugmentation):
        self.folder, self.fit, self.augmentation = folder, fit, augmentation

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> View:
        return self.draw(index, random.Random(index))

    def draw(self, index: int, generator: random.Random) -> View:
        """Sample `index` with its chances taken from the generator."""
        return self.augmentation(*self.folder[index], self.fit, generator)

    def source(self, index: int) -> str:
        """The picture's path."""
        return self.folder.source(index)


class Fitted:
    """Pictures with boxes as they are, brought to the detector's size, for measuring."""

    def __init__(self, folder: BoxFolder, fit: Fit):
        self.folder, self.fit = folder, fit

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> View:
        image, boxes = self.folder[index]
        corners = self.fit.boxes(boxes.corners, *image.size)
        return View(self.fit.prepare(image), corners, boxes.labels, boxes.ignored)

    def source(self, index: int) -> str:
        """The picture's path."""
        return self.folder.source(index)


def collate_views(views: Sequence[View]) -> dict[str, Any]:
    """A batch: images uint8 (b, 3, y, x), grey where one is smaller, their sizes (b, 2) int64 as y and x, and lists of
    each picture's boxes, labels and ignored.
    """
    sizes = torch.tensor([view.pixels.shape[-2:] for view in views])
    images = torch.full((len(views), 3, *sizes.amax(0).tolist()), FILL, dtype=torch.uint8)
    for image, view in zip(images, views, strict=True):
        image[:, : view.pixels.shape[-2], : view.pixels.shape[-1]] = view.pixels
    lists = {name: [getattr(view, name) for view in views] for name in ("boxes", "labels", "ignored")}
    return {"images": images, "sizes": sizes, **lists}
