"""Pictures that a generating system trains on and is measured on: how all its recipes find them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from volvelle.data.pictures import PictureSet, read_pictures
from volvelle.data.scenes import write_scenes
from volvelle.data.text import spread
from volvelle.errors import VolvelleError
from volvelle.runs import RunFolder
from volvelle.train.classify import data_folder
from volvelle.train.observer import Observer, say_first
from volvelle.train.ranks import Ranks
from volvelle.train.recipes.pictures import ViewOptions
from volvelle.train.scenes import data_path


@dataclass(frozen=True)
class PictureParts:
    """Pictures to train on and to measure on; `where` says what the latter are."""

    train: PictureSet
    held: PictureSet
    where: str


def read_picture_parts(recipe: ViewOptions, run: RunFolder, observer: Observer, ranks: Ranks) -> PictureParts:
    """Find and check all pictures. Raises VolvelleError for bad files, and for one picture only."""
    folder = data_folder(str(data_path(recipe.data, run, observer, ranks, seed=recipe.seed, write=_drawn(recipe))))
    train, held = read_pictures(folder, on_bad=recipe.on_bad)
    where = f"the part of {recipe.data} that is for that"
    if recipe.held_out is not None:
        read = read_pictures(data_folder(recipe.held_out), on_bad=recipe.on_bad)
        held, where = read[1] or read[0], recipe.held_out
    observer.say(f"{recipe.data}: {train}")
    say_first(observer, train.skipped)
    if held is None:
        if len(train) < 2:
            raise VolvelleError(f"{recipe.data}: one picture leaves none to measure on", tip="give held_out=FOLDER")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
        count = min(len(train) - 1, max(1, round(recipe.held_out_share * len(train))))
        train, held = train.part(sorted(order[count:])), train.part(sorted(order[:count]))
        where = "pictures set aside before training"
    return PictureParts(train, held, where)


def _drawn(recipe: ViewOptions) -> Callable[..., Path]:
    """How scenes are drawn to be learnt: many, and small, with few garments that are large in them.

    What is said of a picture can be learnt only where it fills the picture, and from thousands of them.
    """
    measured = max(1, recipe.scenes // 20)
    return partial(
        write_scenes, train=recipe.scenes, val=measured, size=recipe.size or 64, garments=(1, 2), sides=(0.4, 0.65)
    )


def few(pictures: PictureSet, most: int | None) -> PictureSet:
    """At most so many of the pictures, spread over all."""
    return pictures if most is None or len(pictures) <= most else pictures.part(spread(range(len(pictures)), most))
