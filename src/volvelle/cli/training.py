"""What the training verbs share: the observer that draws progress, starting a run, the last lines."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from volvelle.cli.console import duration, result, say, table, wants_json, warn
from volvelle.errors import VolvelleError
from volvelle.runs import RunFolder
from volvelle.train.comparison_outcome import HEADERS, Compared
from volvelle.train.observer import Observer, Progress
from volvelle.train.options import FitOptions, to_dict

if TYPE_CHECKING:
    from volvelle.train.outcome import Outcome
    from volvelle.train.ranks import Ranks

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
    """Make a run folder, run the recipe of that kind in it, and print the result.

    With `ranks` above 1 the work is done by as many new processes. As one of torchrun's workers, this process joins the
    others; one that torchrun has started again goes on with the run of its predecessor.
    """
    from volvelle.train.launch import hush, launched

    if launched():
        hush()
        return _as_worker(lambda ranks: _begun(kind, recipe, name, ranks), recipe)
    if recipe.ranks == 1 and (recipe.shard == "fsdp" or recipe.all_reduce != "torch" or recipe.compress):
        warn("shard, all_reduce and compress do nothing with one rank")
    run = RunFolder.create(name, kind=kind, config=to_dict(recipe))
    say(f"run {run.path}")
    with _dropped_if_idle(run):
        return _launch(run, recipe.ranks) if recipe.ranks > 1 else closing_lines(_train(kind, recipe, run))


def resume(path: Path, *, lost: bool = False) -> int:
    """Continue the run in that folder, with as many ranks as it had, and print the result.

    `lost`: the machine that it was running on is gone.
    """
    from volvelle.train.launch import hush, launched

    hush()
    from volvelle.train.resume import give_up, recipe_of_run, resume_run

    if lost:
        give_up(path)
    recipe = recipe_of_run(path)
    if launched():
        return _as_worker(lambda ranks: path, recipe)
    if recipe.ranks > 1:
        return _launch(RunFolder.open(path), recipe.ranks)
    with console() as observer:
        return closing_lines(resume_run(path, observer=observer))


def _train(kind: str, recipe: FitOptions, run: RunFolder) -> Outcome:
    from volvelle.train.resume import KINDS

    _, function = KINDS[kind]()
    with console() as observer:
        return function(recipe, run, observer=observer)


@contextlib.contextmanager
def _dropped_if_idle(run: RunFolder) -> Iterator[None]:
    """Bad data or a wrong option: nothing was measured or trained, so nothing is worth keeping."""
    try:
        yield
    except (VolvelleError, SystemExit):
        if not run.metrics():
            shutil.rmtree(run.path)
        raise


def _launch(run: RunFolder, ranks: int) -> int:
    """Do the work in `ranks` processes, which print what there is to say."""
    from volvelle.train.launch import launch

    code = launch(ranks, ["resume", str(run.path), *(["--json"] if wants_json() else [])])
    if code not in (0, INTERRUPTED):
        raise SystemExit(code)
    return code


def _begun(kind: str, recipe: FitOptions, name: str | None, ranks: Ranks) -> Path:
    """The run folder of torchrun's workers, made by rank 0: that of the workers before a restart, if there is one."""
    from volvelle.runs import scan
    from volvelle.train.launch import job, options_of, restarts

    if restarts():
        for run in reversed(scan()):
            if run.manifest.get("job") == job():
                return run.path
    run = RunFolder.create(name, kind=kind, config=to_dict(options_of(recipe, ranks)))
    run.update_manifest(job=job())
    say(f"run {run.path}")
    return run.path


def _as_worker(begin: Callable[[Ranks], Path], recipe: FitOptions) -> int:
    """Work as one of many; only rank 0 prints, or the first rank that fails."""
    from volvelle.train.launch import joined
    from volvelle.train.observer import Quiet
    from volvelle.train.resume import resume_run
    from volvelle.train.watch import RankLost

    with joined(recipe, device=getattr(recipe, "device", None)) as ranks:
        path = ranks.share(begin(ranks) if ranks.leads else Path())
        try:
            with console() as observer:
                outcome = resume_run(path, observer=observer if ranks.leads else Quiet(), ranks=ranks)
        except RankLost as error:
            error.tip = f"volvelle resume {path}"
            raise
    if ranks.leads:
        return closing_lines(outcome)
    return 0 if outcome.interrupted is None else INTERRUPTED


def closing_lines(outcome: Outcome) -> int:
    """Print what came out, where it is and what to do next; the exit code."""
    _say_outcome(outcome)
    result(outcome.record())
    return 0 if outcome.interrupted is None else INTERRUPTED


def _say_outcome(outcome: Outcome) -> None:
    if outcome.interrupted is not None:
        done = f"{outcome.unit} {outcome.step} of {outcome.steps}"
        warn(f"stopped by {outcome.interrupted} after {done}; everything is saved")
        say(f"continue with: {outcome.resume}")
        return
    say("", f"{outcome.steps} {outcome.unit}s in {duration(outcome.seconds)}")
    if isinstance(outcome, Compared):
        table(HEADERS, [row.cells() for row in outcome.rows])
    wide = max([11, *map(len, outcome.after)])
    for name, after in outcome.after.items():
        before = outcome.before.get(name)
        say(f"  held-out {name:<{wide}} {after:.4g}" + (f"   before: {before:.4g}" if before is not None else ""))
    say(f"run      {outcome.run}", f"report   {outcome.report}")
    for command in outcome.next:
        say(f"next     {command}")
