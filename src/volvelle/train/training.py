"""What every recipe does around its training: it makes ready, the loop trains, and it closes the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from volvelle.data.loader import Loader
from volvelle.runs import RunFolder
from volvelle.train.loop import FitResult, fit
from volvelle.train.observer import Observer
from volvelle.train.options import FitOptions
from volvelle.train.outcome import Outcome
from volvelle.train.phase import Objective
from volvelle.train.ranks import Ranks
from volvelle.train.text_run import closing

R = TypeVar("R", bound=FitOptions)
R_contra = TypeVar("R_contra", bound=FitOptions, contravariant=True)


@dataclass(frozen=True)
class Stage:
    """Where a training takes place: its run folder, who hears of it, the ranks that share it, whether it goes on."""

    run: RunFolder
    observer: Observer
    ranks: Ranks
    resume: bool


@dataclass(frozen=True)
class Ready:
    """What a recipe made ready: what is trained, on which batches, and how the run is closed.

    `close` saves and measures unless the result says that the run was interrupted, and writes the report. Of many ranks
    only rank 0 calls it.
    """

    objective: Objective
    loader: Loader
    close: Callable[[FitResult], Outcome]


class Train(Protocol[R_contra]):
    """A function that trains by a recipe, in a run folder."""

    __name__: str

    def __call__(
        self,
        recipe: R_contra,
        run: RunFolder,
        *,
        observer: Observer | None = None,
        resume: bool = False,
        ranks: Ranks | None = None,
    ) -> Outcome:
        """`resume=True` continues an interrupted run. Of many `ranks` all call this, and only rank 0 writes."""
        ...


def training(make_ready: Callable[[R, Stage], Ready]) -> Train[R]:
    """The function that trains by a recipe, of the one that makes its training ready.

    It has the name and the docstring of `make_ready` and is called as `Train` says.
    """

    def train(
        recipe: R,
        run: RunFolder,
        *,
        observer: Observer | None = None,
        resume: bool = False,
        ranks: Ranks | None = None,
    ) -> Outcome:
        stage = Stage(run, observer or Observer(), ranks or Ranks(), resume)
        with closing(run):
            ready = make_ready(recipe, stage)
            result = fit(
                ready.objective,
                ready.loader,
                options=recipe,
                run=run,
                observer=stage.observer,
                resume=resume,
                ranks=stage.ranks,
            )
            if not stage.ranks.leads:
                return Outcome(run.path, result.step, result.steps, interrupted=result.interrupted)
            return ready.close(result)

    # Not functools.wraps: help() would show make_ready's arguments.
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(train, name, getattr(make_ready, name))
    return train
