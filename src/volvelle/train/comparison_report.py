"""report.html of a comparison: the table, what each method costs against what it gives, and how it got there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from volvelle.runs import RunFolder, environment
from volvelle.train.charts import Series, line_chart
from volvelle.train.comparison_outcome import HEADERS, Row
from volvelle.train.evaluate import Prompted
from volvelle.train.report import Report

WIDTH = 420


def write_report(
    run: RunFolder,
    rows: Sequence[Row],
    trials: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    subtitle: str,
    note: str,
    samples: Sequence[tuple[Prompted, Mapping[str, str]]],
    commands: tuple[str, ...],
) -> Path:
    """Write the page. `trials` maps each method to the metrics of its chosen training, `samples` prompts to answers."""
    report = Report(str(run.manifest.get("name", run.path.name)), subtitle=subtitle)
    if note:
        report.text(note)
    report.table(HEADERS, [row.cells() for row in rows])
    report.text(
        "Every method was trained for as many steps with each of the same learning rates, and is shown with the one "
        "that was best on examples set aside of the training data. Shares are of the model's parameters; memory is "
        "that of a step's tensors on the largest batch."
    )
    charts(report, rows, trials)
    for prompt, answers in samples:
        if answers:
            report.heading("What each writes" if prompt is samples[0][0] else "").text(prompt.example.prompt.strip())
            report.table(
                ("who", "answer"), [*answers.items(), *(("reference", text) for text in prompt.references[:1])]
            )
    report.heading("Next").commands(commands)
    report.heading("Settings").details("Options (config.yaml)", run.config())
    report.details("Environment (env.json)", environment())
    return report.write(run.path / "report.html")


def charts(report: Report, rows: Sequence[Row], trials: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Loss against memory and against time a step; the course of the chosen trainings; the choice of the rate."""
    measured = [row for row in rows if row.run]
    if not measured:
        return
    report.heading("What it costs, and what it gives")
    # With their values the names of many methods are too long for a line above: they stand beside their points.
    names = [f"{row.method} {row.loss:.4f}" for row in measured]
    costs = [((row.peak or 0) / 1e9, row.seconds or 0.0) for row in measured]
    memory, time = (
        [Series(name, [(cost[i], row.loss)], dots=True) for name, cost, row in zip(names, costs, measured, strict=True)]
        for i in range(2)
    )
    figures = (
        line_chart(memory, x_label="peak memory, GB", y_label="held-out loss", width=WIDTH),
        line_chart(time, x_label="seconds a step", y_label="held-out loss", width=WIDTH),
    )
    report.html('<div class="pair">' + "".join(f"<figure>{figure}</figure>" for figure in figures) + "</div>")
    report.heading("How it got there")
    course = [
        Series(
            row.method, [(r["step"], r["loss"]) for r in trials[row.method] if r.get("event") == "train"], smooth=True
        )
        for row in measured
    ]
    rates = [
        Series(row.method, [(math.log10(float(rate)), loss) for rate, loss in row.tuning.items()], dots=True)
        for row in measured
    ]
    figures = (
        line_chart(course, y_label="training loss", width=WIDTH),
        line_chart(rates, x_label="log10 of the learning rate", y_label="tuning loss", width=WIDTH),
    )
    report.html('<div class="pair">' + "".join(f"<figure>{figure}</figure>" for figure in figures) + "</div>")
