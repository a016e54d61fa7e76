"""Crowds: drawn pictures of many objects that look alike and lie over each other, each numbered in a mask.

What tells an object from its neighbour of the same colour is its outline, and the box or the click that asks for it. A
model that is to find objects of kinds it never saw has to learn that, and not the looks of one kind: so everything else
about a crowd is drawn at random, its ground, colours, textures, rims, shading and blur (domain randomisation; Tobin et
al. 2017, "Domain Randomization for Transferring Deep Neural Networks from Simulation to the Real World").

Objects are garments of Fashion-MNIST, and smooth shapes with the outline, in polar coordinates,

    r(θ) = 1 + Σ_k a_k cos(kθ + φ_k),   k = 2 … 5,   a_k ~ N(0, (0.18 / k)²)

A picture depends on (seed, part, number) alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage
from torch import Tensor

from volvelle.data.boxes_coco import coco_document
from volvelle.data.boxes_notes import Object
from volvelle.data.idx import read_idx_folder
from volvelle.data.scenes import GROUNDS, Part, drawn_ground
from volvelle.errors import UsageError
from volvelle.files import write_atomic
from volvelle.hub import fetch

OBJECT = "object"
"""The one class of their boxes."""
COUNT = (5, 18)
"""The least and the most objects."""
SIDES = (0.1, 0.2, 0.4)
"""Sides of objects as shares of the picture's: half of them lie between the first two, the others anywhere."""
INSIDE, UNCOVERED = 0.4, 0.5
"""The least shares of an object that lie in the picture, and that later ones leave uncovered of that."""


@dataclass(frozen=True)
class Look:
    """What the objects of one crowd have in common; colours are of 255.

    `deviation` is that of an object's colour from `colour`, none: any. `shade` is how much of a garment's own shading
    shows, `rim` what the outermost pixels are multiplied by, `pale` how far the middle goes over to `behind`.
    """

    colour: np.ndarray
    deviation: float | None
    shade: float
    rim: float
    pale: float
    behind: np.ndarray
    shapes: float

    def paint(self, draw: np.random.Generator) -> np.ndarray:
        """The colour (3,) of one object."""
        if self.deviation is None:
            return draw.uniform(20, 245, 3)
        return self.colour + draw.normal(0, self.deviation, 3)


class Crowds:
    """`count` crowds of `size` x `size` pixels; `crowd(i)` is a picture uint8 (y, x, 3) and its objects uint8 (y, x).

    In the objects' mask 0 is the ground, and 1, 2, … are objects in the order in which they were laid down. Fetches
    Fashion-MNIST at first use; crowds of the val part show garments of its test part.

    >>> Crowds(10, size=16)
    Traceback (most recent call last):
    volvelle.errors.UsageError: crowds: count >= 1 and size >= 64 are wanted, got 10 and 16
    """

    def __init__(self, count: int, *, size: int = 320, seed: int = 0, part: Part = "train"):
        if count < 1 or size < 64:
            raise UsageError(f"crowds: count >= 1 and size >= 64 are wanted, got {count} and {size}")
        self.count, self.size, self.seed, self.part = count, size, seed, part

    def __len__(self) -> int:
        return self.count

    @cached_property
    def garments(self) -> Tensor:
        """Fashion-MNIST's images uint8 (n, 28, 28) of this part."""
        train, test = read_idx_folder(fetch("fashion-mnist"))
        return (train if self.part == "train" else test)[0]

    def crowd(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Crowd `index`. Raises IndexError beyond the last."""
        if not 0 <= index < self.count:
            raise IndexError(f"crowd {index}: there are {self.count}")
        draw = np.random.default_rng([self.seed, ("train", "val").index(self.part), index])
        image = _ground(draw, self.size)
        look = _look(draw, image.mean((0, 1)))
        objects, left = np.zeros((self.size, self.size), dtype=np.uint8), list[int]()
        for _ in range(int(draw.integers(COUNT[0], COUNT[1] + 1))):
            for _ in range(10):  # where it hides others too much it is tried elsewhere, and left out at last
                low, middle, high = SIDES
                side = int(self.size * (draw.uniform(low, high) if draw.random() < 0.5 else draw.uniform(low, middle)))
                shape, paint = self._object(draw, side, look)
                if _lay(draw, image, objects, left, shape, paint):
                    break
        return _blurred(draw, image), objects

    def _object(self, draw: np.random.Generator, side: int, look: Look) -> tuple[np.ndarray, np.ndarray]:
        """One object's outline bool (side, side) and what it looks like (side, side, 3)."""
        if draw.random() < look.shapes:
            shape, paint = _smooth(draw, side, look)
        else:
            garment = Image.fromarray(self.garments[int(draw.integers(len(self.garments)))].numpy())
            grey = np.asarray(garment.resize((side, side), Image.Resampling.BILINEAR))
            grey = np.rot90(grey, int(draw.integers(4)))
            shape = grey > 24
            paint = (1 - look.shade + look.shade * grey[..., None] / 255) * look.paint(draw)
        width = 2 * max(1, side // 20) + 1
        inner = np.asarray(Image.fromarray(shape).convert("L").filter(ImageFilter.MinFilter(width))) > 0
        return shape, np.where((shape & ~inner)[..., None], paint * look.rim, paint)


def write_crowds(
    folder: Path,
    *,
    train: int = 1000,
    val: int = 60,
    size: int = 320,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write crowds as a folder of `images/` and `masks/`, each with `train/` and `val/`, and return it.

    A pixel of a mask says which object of its picture it shows: `volvelle train promptable data=… numbers=objects`.
    train.json and val.json hold the boxes in COCO's format, of one class: `volvelle train detect data=…`.
    """
    done = 0
    parts: tuple[tuple[Part, int], ...] = (("train", train), ("val", val))
    for part, count in parts:
        crowds = Crowds(count, size=size, seed=seed, part=part)
        for kind in ("images", "masks"):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
        found: list[list[Object]] = []
        for index in range(count):
            image, objects = crowds.crowd(index)
            for kind, pixels in (("images", image), ("masks", objects)):
                Image.fromarray(pixels).save(folder / kind / part / f"{index:05d}.png")
            found.append(_boxes(objects))
            done += 1
            if progress:
                progress(done, train + val)
        listed = [(f"{index:05d}.png", (size, size)) for index in range(count)]
        write_atomic(folder / f"{part}.json", json.dumps(coco_document(listed, found, [OBJECT])))
    return folder


def _boxes(objects: np.ndarray) -> list[Object]:
    """A box around what can be seen of each object of a mask."""
    boxes = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(objects), 1):
        area = int((objects[rows, columns] == number).sum())
        boxes.append(Object(OBJECT, (columns.start, rows.start, columns.stop, rows.stop), "", area=area))
    return boxes


def _ground(draw: np.random.Generator, size: int) -> np.ndarray:
    """A ground (size, size, 3): a pattern, or none, often of any brightness, its contrast more or less."""
    kind = GROUNDS[draw.integers(len(GROUNDS))] if draw.random() < 0.6 else "plain"
    ground = drawn_ground(draw, size, kind)
    if draw.random() < 0.6:
        grey = draw.random() < 0.5
        middle = draw.uniform(60, 240) + draw.uniform(-15, 15, 3) if grey else draw.uniform(40, 235, 3)
        ground = (ground - ground.mean((0, 1))) * draw.uniform(0.2, 1) + middle
    return ground


def _look(draw: np.random.Generator, ground: np.ndarray) -> Look:
    """How the objects look on a ground of this mean colour (3,)."""
    colour = draw.uniform(30, 240, 3)
    if draw.random() < 0.5:  # near the ground's
        way = draw.normal(0, 1, 3)
        colour = (ground + way / np.linalg.norm(way) * draw.uniform(30, 110)).clip(10, 245)
    pale = draw.uniform(-0.3, 0.9) if draw.random() < 0.6 else 0.0
    return Look(
        colour,
        deviation=10.0 if draw.random() < 0.75 else None,
        shade=draw.uniform(0.05, 0.65),
        rim=draw.uniform(0.65, 1.1) if draw.random() < 0.5 else 1.0,
        pale=abs(pale),
        behind=ground if pale > 0 else np.full(3, 255.0),
        shapes=float(draw.choice([0.0, 0.5, 1.0])),
    )


def _smooth(draw: np.random.Generator, side: int, look: Look) -> tuple[np.ndarray, np.ndarray]:
    """A smooth shape bool (side, side) that is turned and flattened, and what it looks like (side, side, 3)."""
    angles = np.linspace(0, 2 * np.pi, 181)
    radius = 1 + sum(draw.normal(0, 0.18 / k) * np.cos(k * angles + draw.uniform(0, 2 * np.pi)) for k in range(2, 6))
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    turn, flat = draw.uniform(0, np.pi), draw.uniform(0.75, 1)
    u, v = np.cos(turn) * x + np.sin(turn) * y, (np.cos(turn) * y - np.sin(turn) * x) / flat
    far = np.hypot(u, v) / (0.42 * side) / np.interp(np.arctan2(v, u) % (2 * np.pi), angles, radius)
    cells = int(draw.integers(2, max(3, side // 3)))
    noise = Image.fromarray(draw.normal(0, draw.uniform(0, 0.12), (cells, cells)).astype(np.float32))
    texture = 1 + np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC))[..., None]
    pale = look.pale * (1 - far * draw.uniform(1, 1.8)).clip(0, 1)[..., None]
    return far < 1, (1 - pale) * texture * look.paint(draw) + pale * look.behind


def _lay(
    draw: np.random.Generator,
    image: np.ndarray,
    objects: np.ndarray,
    left: list[int],
    shape: np.ndarray,
    paint: np.ndarray,
) -> bool:
    """Lay an object somewhere, perhaps over the border, and say whether it hid no other too much, nor lay outside.

    `left` says how many more pixels of each object may be hidden.
    """
    size, side = len(image), len(shape)
    top, start = (int(place) for place in draw.integers(-(side // 4), size - side + side // 4 + 1, 2))
    rows = slice(max(top, 0), min(top + side, size))
    columns = slice(max(start, 0), min(start + side, size))
    cut = slice(rows.start - top, rows.stop - top), slice(columns.start - start, columns.stop - start)
    seen, there = shape[cut], (rows, columns)
    if seen.sum() < max(INSIDE * shape.sum(), 0.05 * side * side):
        return False  # too much outside, or nearly nothing
    hidden = np.bincount(objects[there][seen], minlength=len(left) + 1)[1:]
    if any(count > rest for count, rest in zip(hidden, left, strict=True)):
        return False
    for number, count in enumerate(hidden):
        left[number] -= int(count)
    left.append(int((1 - UNCOVERED) * seen.sum()))
    image[there][seen] = paint[cut][seen]
    objects[there][seen] = len(left)
    return True


def _blurred(draw: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """The picture uint8, often a little out of focus, with noise."""
    picture = Image.fromarray(image.clip(0, 255).round().astype(np.uint8))
    if draw.random() < 0.6:
        picture = picture.filter(ImageFilter.GaussianBlur(draw.uniform(0, 2.2)))
    noisy = np.asarray(picture) + draw.normal(0, draw.uniform(0, 8), image.shape)
    return noisy.clip(0, 255).round().astype(np.uint8)
