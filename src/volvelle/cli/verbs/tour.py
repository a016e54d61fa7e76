"""`volvelle tour`: a few minutes of real work on this machine, and a report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from volvelle.cli.console import duration, result, say

EXAMPLES = ("volvelle tour", "volvelle tour quick=true --json")


@dataclass(frozen=True)
class Options:
    """How much to show."""

    quick: bool = False
    """A minute instead of a few: fewer training steps, shorter answers."""
    root: Path = Path("runs")
    """Folder that gets the run folder `tour`; an earlier tour there is replaced."""


def main(options: Options) -> int:
    """Walk through the stages, write the report, and say what to try next."""
    from volvelle.cli.tour.frame import Tour, walk
    from volvelle.cli.tour.stages import STAGES
    from volvelle.runs import RunFolder, environment
    from volvelle.train.report import Report

    began = time.perf_counter()
    run = RunFolder.create("tour", root=options.root, kind="tour", config={"quick": options.quick}, replace=True)
    machine = environment()
    subtitle = f"{machine['platform']}, {machine['cpus_allowed']} cores, torch {machine['packages'].get('torch')}"
    say(f"tour on {subtitle}; writes {run.path}")
    tour = Tour(run, Report("What this machine just did", subtitle=subtitle), quick=options.quick)
    try:
        walk(tour, STAGES)
    except BaseException:
        run.update_manifest(status="interrupted")
        raise
    took = time.perf_counter() - began
    page = _write(tour, took)
    run.update_manifest(status="finished", seconds=tour.seconds, missing=tour.missing)
    say("", f"the tour took {duration(took)}", f"report   {page}", "try next:")
    say(*(f"  {command}" for command in tour.next))
    result({"run": run.path, "report": page, "seconds": round(took, 1), "missing": tour.missing, **tour.results})
    return 1 if tour.missing else 0


def _write(tour, took: float) -> Path:
    from volvelle.train.report import Report

    stages = [(title, seconds, tour.missing.get(title, "done")) for title, seconds in tour.seconds.items()]
    tour.report.heading("Time").table(("stage", "seconds", ""), [*stages, ("all", round(took, 1), "")])
    tour.report.heading("Next").commands(tour.next)
    page = Report(tour.report.title, subtitle=tour.report.subtitle).tiles(tour.tiles)
    page.html(tour.report.body())
    return page.write(tour.path / "report.html")
