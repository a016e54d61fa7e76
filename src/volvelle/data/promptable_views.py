"""Random crops of pictures with objects and first prompts, for training; and batches of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from volvelle.data.masks_augment import Augmentation
from volvelle.data.masks_labels import VOID
from volvelle.data.promptable import Pictures
from volvelle.data.promptable_clicks import box_around, first_click
from volvelle.data.promptable_objects import choose

FEWEST = 48
"""Pixels of a crop that an object shows at least: fewer are three places of a mask."""


class View(NamedTuple):
    """A crop and what is asked of it; k objects, or none.

    pixels uint8 (3, y, x); masks uint8 (k, y, x) of 0 and 1; known uint8 (y, x), 0 where void; classes uint8 (y, x),
    VOID where a pixel has none; points (k, 2) fp32 with a click in each object; boxes (k, 4) fp32 as somebody draws
    them.
    """

    pixels: Tensor
    masks: Tensor
    known: Tensor
    classes: Tensor
    points: Tensor
    boxes: Tensor


class ObjectViews:
    """Pictures with objects whose items are random views (`draw` is what the loader asks).

    Magnifications of the augmentation are beside that which makes a picture's longer side `side` pixels. `prompts`
    objects are drawn in each crop. One that shows less than half of `least` pixels of the picture, or less
    than FEWEST of the crop, is not asked for. `central` is the share of first clicks in the middle of their object.
    """

    def __init__(
        self,
        folder: Pictures,
        augmentation: Augmentation,
        *,
        side: int,
        prompts: int,
        least: int,
        central: float = 0.5,
    ):
        self.folder, self.augmentation, self.side = folder, augmentation, side
        self.prompts, self.least, self.central = prompts, least, central

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> View:
        return self.draw(index, random.Random(index))

    def draw(self, index: int, generator: random.Random) -> View:
        """Sample `index` with its chances taken from the generator."""
        image, objects = self.folder[index]
        factor, (low, high) = self.side / max(image.size), self.augmentation.scale
        window = replace(self.augmentation, scale=(factor * low, factor * high)).window(image, generator)
        pixels = self.augmentation.picture(image, window, generator)
        least = max(FEWEST, round(self.least * window.scale**2 / 2))
        seen = objects.seen(window, least)
        masks = choose(seen, self.prompts, least, generator)
        points = [first_click(mask, generator, self.central)[:2] for mask in masks]
        boxes = [box_around(mask, generator) for mask in masks]
        known = torch.from_numpy((~seen.void()).astype(np.uint8))
        return View(
            pixels,
            torch.from_numpy(masks.astype(np.uint8)),
            known,
            torch.full_like(known, VOID) if seen.classes is None else torch.from_numpy(seen.classes),
            torch.tensor(points, dtype=torch.float32).reshape(-1, 2),
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        )

    def source(self, index: int) -> str:
        """The picture's path."""
        return self.folder.source(index)


def collate_objects(views: Sequence[View]) -> dict[str, Tensor]:
    """Stack views of one size; those without objects ask for nothing: their row of `there` (b, k) is false."""
    most = max(1, *(len(view.masks) for view in views))

    def filled(name: str) -> Tensor:
        parts = [getattr(view, name) for view in views]
        return torch.stack([torch.cat((part, part.new_zeros(most - len(part), *part.shape[1:]))) for part in parts])

    there = torch.tensor([[i < len(view.masks) for i in range(most)] for view in views])
    stacked = {name: torch.stack([getattr(view, name) for view in views]) for name in ("pixels", "known", "classes")}
    return {
        "images": stacked["pixels"],
        "known": stacked["known"],
        "classes": stacked["classes"],
        **{name: filled(name) for name in ("masks", "points", "boxes")},
        "there": there,
    }
