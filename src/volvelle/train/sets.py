"""Pictures to train on, to choose the best moment by, and to measure on: how a folder is parted into the three."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from volvelle.data.loader import Loader
from volvelle.data.masks_augment import split_in_runs
from volvelle.errors import VolvelleError
from volvelle.train.options import FitOptions


class Pictures(Protocol):
    """A collection that can be parted."""

    def __len__(self) -> int: ...

    def part(self, indices: Sequence[int], /) -> Pictures:
        """Some of it."""
        ...


F = TypeVar("F", bound=Pictures)


@dataclass(frozen=True)
class Sets(Generic[F]):
    """Pictures to train on, to choose the best moment by, and to measure the result on; `where` says what the last is.

    None of the three shares a picture with another; `selection` is empty where nothing is to be chosen.
    """

    train: F
    selection: F
    test: F
    where: str


def part_into_sets(train: F, test: tuple[F, str] | None, *, share: float, seed: int) -> Sets[F]:
    """Set `share` of the pictures aside to choose by, and where `test` is not given as many again to measure on.

    Pictures are set aside in runs of neighbours (`split_in_runs`). With a share of 0 nothing is chosen, and a tenth is
    measured on. Raises VolvelleError for fewer than three pictures.
    """
    if len(train) < 3:
        raise VolvelleError(f"{len(train)} pictures cannot be split", tip="three are the least")

    def part(indices: Sequence[int]) -> F:
        return train.part(indices)  # pyright: ignore[reportReturnType]  # of the kind of what it is a part of

    if test is None:
        kept, rest = split_in_runs(len(train), max(2 / len(train), 2 * share or 0.1), seed)
        chosen, measured = (rest[::2], rest[1::2]) if share else ([], rest)
        return Sets(part(kept), part(chosen), part(measured), "pictures set aside before training")
    kept, chosen = split_in_runs(len(train), share, seed) if share else (range(len(train)), [])
    return Sets(part(kept), part(chosen), *test)


def own_test(splits: Mapping[str, F], path: Path) -> tuple[F, str] | None:
    """The part of a folder that is there to measure on, and what it is; None where there is none."""
    other = next((name for name in ("val", "test") if name in splits), None)
    return (splits[other], f"the {other} part of {path.name}") if other is not None and "train" in splits else None


def held_part(splits: Mapping[str, F]) -> F:
    """Of a folder given to measure on the part that is for that, else all of it."""
    return next((splits[name] for name in ("val", "test", "") if name in splits), next(iter(splits.values())))


def drawn_in_batches(recipe: FitOptions, views: Any, collate: Callable[[list[Any]], Any]) -> Loader:
    """Seeded batches to train on. The last, smaller one of an epoch is left out when one whole batch is there."""
    return Loader(
        views,
        recipe.batch,
        seed=recipe.seed,
        collate=collate,
        drop_last=len(views) >= recipe.batch,
        workers=recipe.worker_kind,
        num_workers=recipe.workers,
    )
