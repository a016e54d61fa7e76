"""report.html of a generator: distances, curves of both players, exact W_1, sheets of samples over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from volvelle.data.text import spread
from volvelle.runs import RunFolder
from volvelle.train.charts import Series, line_chart
from volvelle.train.loop import FitResult
from volvelle.train.report import Report, begun, ended, tiles_of_work, training_curves

SAMPLES = "samples"
"""The folder of the sheets in a run's."""
SHEETS = 6
"""Sheets in the report, from the first to the last."""


def write_report(
    run: RunFolder,
    result: FitResult,
    after: Mapping[str, float],
    before: Mapping[str, float],
    *,
    subtitle: str,
    commands: Sequence[str],
    where: str,
) -> Path:
    """Write report.html into the run folder."""
    report = begun(run, result, subtitle)
    tiles = [
        (name, f"{value:.4g}", f"before: {before[name]:.4g}" if name in before else "")
        for name, value in after.items()
        if not name.endswith("floor")
    ]
    floors = {name.removesuffix(" floor"): value for name, value in after.items() if name.endswith("floor")}
    tiles = [(name, value, f"floor: {floors[name]:.4g}" if name in floors else note) for name, value, note in tiles]
    report.tiles([*tiles, *tiles_of_work(result)])
    if after:
        report.text(
            f"Measured beside {where}. The floor of a Fréchet distance (FD) is that of other real pictures, as many: a "
            "perfect generator would reach it. Figures of other features than those named do not compare."
        )
    records = run.metrics()
    training_curves(report.heading("Training"), records)
    _add_distances(report, records)
    _add_sheets(report, run)
    return ended(report, run, commands)


def _add_distances(report: Report, records: Sequence[Mapping[str, Any]]) -> None:
    """The critic's own estimate, and the exact distance in pixels with what a critic of known slope certifies."""
    estimate = Series("critic: E s(data) - E s(samples)", _points(records, "critic_distance"), smooth=True)
    report.figure(line_chart([estimate], y_label="score"), "What the critic tells apart.")
    exact = Series("exact W1 in pixels", _points(records, "held_out_w1_pixels"), dots=True)
    sure = Series("certified lower bound", _points(records, "held_out_certified_w1"), dots=True)
    shown = [series for series in (exact, sure) if series.points]
    report.figure(line_chart(shown, y_label="W1"), "Samples beside held-out pictures, as vectors of pixels.")


def _points(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(float(r["step"]), float(r[name])) for r in records if isinstance(r.get(name), int | float)]


def _add_sheets(report: Report, run: RunFolder) -> None:
    """Samples of the same latent numbers over time."""
    files = sorted((run.path / SAMPLES).glob("step-*.png"))
    if not files:
        return
    report.heading("Samples").text("Of the same latent numbers at every moment. All sheets are in samples/.")
    for file in dict.fromkeys([*spread(files, SHEETS - 1), files[-1]]):
        report.figure(file.read_bytes(), f"after {int(file.stem.partition('-')[2]):,} steps")
