"""What every stage of the tour gets: where to write, what to say, and the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volvelle.cli.console import say, warn
from volvelle.errors import VolvelleError

if TYPE_CHECKING:
    from volvelle.runs import RunFolder
    from volvelle.train.outcome import Outcome
    from volvelle.train.report import Report


@dataclass
class Tour:
    """The state that stages share: the run folder, the report, figures for the top of the page, commands to try."""

    run: RunFolder
    report: Report
    quick: bool = False
    """Fewer steps and samples, for the tests."""
    tiles: list[tuple[str, str, str]] = field(default_factory=list)
    next: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    results: dict[str, object] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The tour's run folder."""
        return self.run.path

    def train(self, name: str, kind: str, recipe: Any, train: Callable[..., Outcome]) -> tuple[RunFolder, Outcome]:
        """Train by a recipe in a run folder `name` of its own, and end the tour where that was interrupted."""
        from volvelle.cli.training import console
        from volvelle.runs import RunFolder
        from volvelle.train.options import to_dict

        run = RunFolder.create(name, root=self.path, kind=kind, config=to_dict(recipe))
        with console() as observer:
            outcome = train(recipe, run, observer=observer)
        if outcome.interrupted is not None:
            raise KeyboardInterrupt
        return run, outcome


Stage = Callable[[Tour], None]


def walk(tour: Tour, stages: Sequence[tuple[str, Stage]]) -> None:
    """Run the stages one after another; one that cannot run here is named, with the reason, and the tour goes on."""
    for number, (title, stage) in enumerate(stages, 1):
        say("", f"[{number}/{len(stages)}] {title}")
        tour.report.heading(title)
        began = time.perf_counter()
        try:
            stage(tour)
        except VolvelleError as error:
            tour.missing[title] = str(error)
            warn(f"not shown here: {error}" + (f" ({error.tip})" if error.tip else ""))
            tour.report.text(f"Not shown on this machine: {error}")
        tour.seconds[title] = round(time.perf_counter() - began, 1)
        say(f"      {tour.seconds[title]:.0f} s")
