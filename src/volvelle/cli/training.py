"""What the training verbs share: the observer that draws progress, starting a run, the last lines."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from volvelle.cli.console import duration, result, say, warn
from volvelle.errors import VolvelleError
from volvelle.runs import RunFolder
from volvelle.train.observer import Observer, Progress
from volvelle.train.options import FitOptions, to_dict

if TYPE_CHECKING:
    from volvelle.train.outcome import Outcome

INTERVAL = 5.0
"""Seconds between two progress lines in a pipe."""
INTERRUPTED = 130
"""Exit code of a run that was stopped and can be resumed."""

T = TypeVar("T", bound=FitOptions)


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
    """Make a run folder, run the recipe of that kind in it, and print the result."""
    from volvelle.train.resume import KINDS

    run = RunFolder.create(name, kind=kind, config=to_dict(recipe))
    say(f"run {run.path}")
    _, function = KINDS[kind]()
    try:
        with console() as observer:
            outcome = function(recipe, run, observer=observer)
    except VolvelleError:
        # Bad data or a wrong option: nothing was measured or trained, so nothing is worth keeping.
        if not run.metrics():
            shutil.rmtree(run.path)
        raise
    return closing_lines(outcome)


def closing_lines(outcome: Outcome) -> int:
    """Print what came out, where it is and what to do next; the exit code."""
    _say_outcome(outcome)
    result(outcome.record())
    return 0 if outcome.interrupted is None else INTERRUPTED


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
