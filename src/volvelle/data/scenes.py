"""Scenes: real Fashion-MNIST garments on drawn backgrounds, with masks, boxes and captions known by construction.

They stand in where no pictures are at hand: in the tour, in tests and examples. A scene is a picture of one to four
garments in different sizes and colours on a textured ground; it depends on (seed, part, number) alone. Garments of the
training part come from Fashion-MNIST's 60,000 training pictures, those of the test part from its 10,000 others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from torch import Tensor

from volvelle.data.boxes_coco import coco_document
from volvelle.data.boxes_notes import Object
from volvelle.data.idx import FASHION_MNIST, read_idx_folder
from volvelle.data.masks_labels import Labels
from volvelle.errors import UsageError
from volvelle.files import write_atomic
from volvelle.hub import fetch

CLASSES = ("background", *(name.lower() for name in FASHION_MNIST))
"""Class 0 is the ground, class c + 1 garment c."""
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 57, 47), "orange": (236, 140, 34), "yellow": (238, 205, 60), "green": (62, 160, 74),
    "blue": (52, 106, 204), "purple": (137, 76, 178), "pink": (232, 128, 170), "white": (240, 240, 236),
}  # fmt: skip
GROUNDS = ("plain", "striped", "chequered", "mottled")
LEAST_VISIBLE = 0.6
"""The least share of a garment that later ones leave uncovered."""
Part = Literal["train", "val"]


@dataclass(frozen=True)
class Garment:
    """One garment: class number (1 … 10), colour, box x1 y1 x2 y2 in pixels of what can be seen, that part's area."""

    label: int
    colour: str
    box: tuple[int, int, int, int]
    area: int

    def __str__(self) -> str:
        name = CLASSES[self.label]
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {name}"


@dataclass(frozen=True)
class Scene:
    """A picture uint8 (y, x, 3), its classes uint8 (y, x), which garment a pixel shows (0: none), the garments."""

    image: np.ndarray
    mask: np.ndarray
    instances: np.ndarray
    garments: tuple[Garment, ...]
    ground: str

    @property
    def caption(self) -> str:
        """A sentence: `a red coat and a blue bag on a striped background`."""
        words = [str(garment) for garment in self.garments]
        shown = ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]
        return f"{shown} on a {self.ground} background"


class Scenes:
    """`count` scenes of `size` x `size` pixels; item i is (RGB image, class numbers), as of a folder with masks.

    `garments` are the least and the most garments of a scene, `sides` the least and greatest side of one as a share of
    the picture's. Fetches Fashion-MNIST at first use.
    """

    labels = Labels(CLASSES)

    def __init__(
        self,
        count: int,
        *,
        size: int = 128,
        seed: int = 0,
        part: Part = "train",
        garments: tuple[int, int] = (1, 4),
        sides: tuple[float, float] = (0.25, 0.5),
    ):
        if count < 1 or size < 32 or not 1 <= garments[0] <= garments[1]:
            raise UsageError(
                f"scenes: count >= 1, size >= 32 and 1 <= garments are wanted, got {count}, {size} and {garments}"
            )
        if not 0 < sides[0] <= sides[1] <= 1:
            raise UsageError(f"scenes: sides are two shares of a picture, least first, got {sides}")
        self.count, self.size, self.seed, self.part = count, size, seed, part
        self.garments, self.sides = garments, sides

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        scene = self.scene(index)
        return Image.fromarray(scene.image), scene.mask

    def source(self, index: int) -> str:
        """Name of a scene for messages."""
        return f"scene {self.part}/{index}"

    @cached_property
    def pictures(self) -> tuple[Tensor, Tensor]:
        """Fashion-MNIST's images uint8 (n, 28, 28) and labels int64 (n) of this part."""
        train, test = read_idx_folder(fetch("fashion-mnist"))
        return train if self.part == "train" else test

    def scene(self, index: int) -> Scene:
        """Scene `index`. Raises IndexError beyond the last."""
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index}: there are {self.count}")
        draw = np.random.default_rng([self.seed, ("train", "val").index(self.part), index])
        ground = GROUNDS[draw.integers(len(GROUNDS))]
        image = drawn_ground(draw, self.size, ground).astype(np.float64)
        instances = np.zeros((self.size, self.size), dtype=np.uint8)
        placed: list[tuple[int, str, int]] = []  # class, colour, pixels
        for _ in range(int(draw.integers(self.garments[0], self.garments[1] + 1))):
            self._place(draw, image, instances, placed)
        mask = np.array([0, *(label for label, *_ in placed)], dtype=np.uint8)[instances]
        found = tuple(_seen(instances == i, label, colour) for i, (label, colour, _) in enumerate(placed, 1))
        return Scene(np.rint(image).astype(np.uint8), mask, instances, found, ground)

    def _place(
        self, draw: np.random.Generator, image: np.ndarray, instances: np.ndarray, placed: list[tuple[int, str, int]]
    ) -> None:
        """Put one more garment down where it hides no other too much; leave it out after ten tries."""
        images, labels = self.pictures
        colours = tuple(COLOURS)
        for _ in range(10):
            number = int(draw.integers(len(labels)))
            side = int(self.size * draw.uniform(*self.sides))
            top, left = draw.integers(0, self.size - side + 1, 2)
            colour = colours[draw.integers(len(colours))]
            grey = np.asarray(Image.fromarray(images[number].numpy()).resize((side, side), Image.Resampling.BILINEAR))
            shape = grey > 24
            if shape.sum() < 0.05 * side * side:
                continue  # nearly invisible
            there = (slice(top, top + side), slice(left, left + side))
            after = instances.copy()
            after[there][shape] = len(placed) + 1
            left_over = np.bincount(after.reshape(-1), minlength=len(placed) + 2)[1:-1]
            if any(left_over[i] < LEAST_VISIBLE * pixels for i, (*_, pixels) in enumerate(placed)):
                continue
            shade = 0.35 + 0.65 * grey.astype(np.float64)[..., None] / 255
            image[there][shape] = (shade * np.array(COLOURS[colour]))[shape]
            instances[:] = after
            placed.append((int(labels[number]) + 1, colour, int(shape.sum())))
            return


def write_scenes(
    folder: Path,
    *,
    train: int = 400,
    val: int = 100,
    size: int = 128,
    seed: int = 0,
    garments: tuple[int, int] = (1, 4),
    sides: tuple[float, float] = (0.25, 0.5),
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write scenes as a data set that every vision recipe reads, and return the folder.

    images/train and images/val hold PNGs, masks/ the class numbers, classes.txt their names, train.json and val.json
    the boxes in COCO's format, captions.jsonl the sentences. It is complete once captions.jsonl is there.
    """
    captions, done = [], 0
    parts: tuple[tuple[Part, int], ...] = (("train", train), ("val", val))
    for part, count in parts:
        scenes = Scenes(count, size=size, seed=seed, part=part, garments=garments, sides=sides)
        (folder / "images" / part).mkdir(parents=True, exist_ok=True)
        (folder / "masks" / part).mkdir(parents=True, exist_ok=True)
        boxes: list[tuple[str, Scene]] = []
        for index in range(count):
            scene, name = scenes.scene(index), f"{part}/{index:05d}.png"
            Image.fromarray(scene.image).save(folder / "images" / name)
            Image.fromarray(scene.mask).save(folder / "masks" / name)
            captions.append(json.dumps({"image": f"images/{name}", "caption": scene.caption}))
            boxes.append((name.partition("/")[2], scene))
            done += 1
            if progress:
                progress(done, train + val)
        write_atomic(folder / f"{part}.json", json.dumps(_coco(boxes, size)))
    write_atomic(folder / "classes.txt", "\n".join(CLASSES) + "\n")
    write_atomic(folder / "captions.jsonl", "\n".join(captions) + "\n")
    return folder


def _coco(scenes: Sequence[tuple[str, Scene]], size: int) -> dict:
    """Boxes as COCO writes them; categories are the garments."""
    objects = [[Object(CLASSES[g.label], g.box, "", area=g.area) for g in scene.garments] for _, scene in scenes]
    return coco_document([(name, (size, size)) for name, _ in scenes], objects, CLASSES[1:])


def _seen(region: np.ndarray, label: int, colour: str) -> Garment:
    """What can be seen of a garment, as a box around it."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Garment(label, colour, box, int(region.sum()))


def drawn_ground(draw: np.random.Generator, size: int, kind: str) -> np.ndarray:
    """A textured ground (size, size, 3) in 0 … 255: two dim colours mixed by a pattern, and noise."""
    first, second = draw.uniform(40, 170, (2, 3))
    y, x = np.mgrid[:size, :size] / size
    waves = draw.uniform(3, 10)
    if kind == "plain":
        mix = 0.3 * (draw.uniform(-1, 1) * x + draw.uniform(-1, 1) * y)
    elif kind == "striped":
        angle = draw.uniform(0, np.pi)
        mix = 0.5 + 0.5 * np.sign(np.sin(2 * np.pi * waves * (np.cos(angle) * x + np.sin(angle) * y)))
    elif kind == "chequered":
        mix = (np.floor(waves * x) + np.floor(waves * y)) % 2
    else:
        coarse = Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8))
        mix = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255
    picture = first + (second - first) * mix[..., None] + draw.normal(0, 6, (size, size, 3))
    return picture.clip(0, 255)
