"""Scenes as the data of a run that was given none: drawn once, into its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from volvelle.data.scenes import write_scenes
from volvelle.runs import RunFolder
from volvelle.train.observer import Observer
from volvelle.train.ranks import Ranks
from volvelle.train.recipes.segment import SCENES


def data_path(
    data: str,
    run: RunFolder,
    observer: Observer,
    ranks: Ranks,
    *,
    seed: int,
    write: Callable[..., Path] = write_scenes,
) -> Path:
    """The path that `data` names; for "scenes" a folder in the run's, which rank 0 fills by `write`."""
    if data != SCENES:
        return Path(data)
    folder = run.path / "data"
    if ranks.leads and not (folder / "captions.jsonl").is_file():
        observer.say("no data given: scenes of Fashion-MNIST garments on drawn backgrounds")
        write(folder, seed=seed, progress=lambda done, total: observer.work("scenes", done, total))
    ranks.share(None)
    return folder
