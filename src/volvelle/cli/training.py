"""What the training verbs share: the observer that draws progress, starting and resuming runs, the last lines."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from volvelle.cli.console import duration, result, say, warn
from volvelle.errors import UsageError
from volvelle.runs import RunFolder
from volvelle.train.observer import Observer, Progress
from volvelle.train.options import FitOptions, from_dict, to_dict

if TYPE_CHECKING:
    from volvelle.train.outcome import Outcome

INTERVAL = 5.0
"""Seconds between two progress lines in a pipe."""

T = TypeVar("T", bound=FitOptions)
Runner = Callable[..., "Outcome"]


@dataclass(frozen=True)
class Recipe:
    """A kind of run: its options, and the function that runs them."""

    options: type[FitOptions]
    run: Callable[[], Runner]


def _adapt() -> Recipe:
    from volvelle.train.recipes.adapt import AdaptLanguage

    def function() -> Runner:
        from volvelle.train.adapt_language import adapt_language

        return adapt_language

    return Recipe(AdaptLanguage, function)


def _train_language() -> Recipe:
    from volvelle.train.recipes.language import TrainLanguage

    def function() -> Runner:
        from volvelle.train.train_language import train_language

        return train_language

    return Recipe(TrainLanguage, function)


KINDS: Mapping[str, Callable[[], Recipe]] = {"adapt": _adapt, "train-language": _train_language}


class Console(Observer):
    """Draws what the loop tells: one line that moves on a terminal, a plain line every few seconds in a pipe."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._shown = -INTERVAL
        self._open = False

    def say(self, text: str) -> None:
        """Print a fact on a line of its own."""
        self.close()
        say(text)

    def progress(self, progress: Progress) -> None:
        """Show one finished step."""
        self._show(progress.line, last=progress.step == progress.steps)

    def work(self, label: str, done: int, total: int) -> None:
        """Show work that is no training step."""
        self._show(f"{label}: {done}/{total}", last=done == total)

    def close(self) -> None:
        """End the moving line."""
        if self._open:
            print(file=sys.stderr, flush=True)
            self._open = False

    def _show(self, line: str, *, last: bool) -> None:
        now = time.monotonic()
        if self._live:
            print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
            self._open = True
        elif last or now - self._shown >= INTERVAL:
            print(line, file=sys.stderr, flush=True)
            self._shown = now


@contextlib.contextmanager
def console() -> Iterator[Console]:
    """An observer for the length of the block."""
    observer = Console()
    try:
        yield observer
    finally:
        observer.close()


def recipe_of(kind: type[T], options: FitOptions) -> T:
    """The recipe inside a verb's options: its own fields, without those that only the verb knows."""
    return kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)})


def start(kind: str, recipe: FitOptions, name: str | None) -> int:
    """Make a run folder, run the recipe in it, and print the result."""
    run = RunFolder.create(name, kind=kind, config=to_dict(recipe))
    say(f"run {run.path}")
    return _finish(kind, recipe, run, resume=False)


def resume(run: RunFolder) -> int:
    """Continue an interrupted run with the options it began with."""
    kind = run.manifest["kind"]
    if kind not in KINDS:
        raise UsageError(f"{run.path}: a run of kind {kind!r} cannot be resumed", tip=f"kinds: {', '.join(KINDS)}")
    if run.status == "finished":
        raise UsageError(f"{run.path}: this run is finished", tip=f"volvelle generate {run.path}")
    return _finish(kind, from_dict(KINDS[kind]().options, run.config()), run, resume=True)


def _finish(kind: str, recipe: FitOptions, run: RunFolder, *, resume: bool) -> int:
    function = KINDS[kind]().run()
    with console() as observer:
        outcome = function(recipe, run, observer=observer, resume=resume)
    _say_outcome(outcome)
    result(outcome.record())
    return 0 if outcome.interrupted is None else 130


def _say_outcome(outcome: Outcome) -> None:
    if outcome.interrupted is not None:
        warn(f"stopped by {outcome.interrupted} after step {outcome.step} of {outcome.steps}; everything is saved")
        say(f"continue with: {outcome.resume}")
        return
    say("", f"{outcome.steps} steps in {duration(outcome.seconds)}")
    for name, after in outcome.after.items():
        before = outcome.before.get(name)
        say(f"  held-out {name:<11} {after:.4g}" + (f"   before: {before:.4g}" if before is not None else ""))
    say(f"run      {outcome.run}", f"report   {outcome.report}")
    for command in outcome.next:
        say(f"next     {command}")
