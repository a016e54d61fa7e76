"""report.html: one file that shows a run, with nothing fetched from elsewhere and no script.

A `Report` is filled from the top down and written once. Recipes for pictures use `html` and `figure` beside the text
blocks used here; `training_curves` draws what the loop logged.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volvelle.files import write_atomic
from volvelle.runs import RunFolder, environment
from volvelle.train.charts import Series, line_chart
from volvelle.train.outcome import Sample

if TYPE_CHECKING:
    from volvelle.train.loop import FitResult


class Report:
    """A page built block by block. Text given to its methods is escaped; `html` takes markup as it is."""

    def __init__(self, title: str, *, subtitle: str = ""):
        self.title, self.subtitle = title, subtitle
        self._blocks: list[str] = []

    def heading(self, text: str) -> Report:
        """Begin a section."""
        return self.html(f"<h2>{_escape(text)}</h2>")

    def text(self, text: str) -> Report:
        """A paragraph."""
        return self.html(f"<p>{_escape(text)}</p>")

    def tiles(self, tiles: Sequence[tuple[str, str, str]]) -> Report:
        """The main figures: (name, value, a note such as the value before)."""
        body = "".join(
            f'<div class="tile"><div class="name">{_escape(name)}</div><div class="value">{_escape(value)}</div>'
            f'<div class="note">{_escape(note)}</div></div>'
            for name, value, note in tiles
        )
        return self.html(f'<div class="tiles">{body}</div>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Report:
        """A table; columns whose every cell is a number align right."""
        numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
        marks = [' class="number"' if right else "" for right in numeric]
        head = "".join(f"<th{mark}>{_escape(name)}</th>" for mark, name in zip(marks, header, strict=True))
        body = "".join(
            "<tr>" + "".join(f"<td{m}>{_escape(_cell(c))}</td>" for m, c in zip(marks, row, strict=True)) + "</tr>"
            for row in rows
        )
        return self.html(
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def figure(self, picture: str | bytes, caption: str = "") -> Report:
        """A picture: SVG markup, or the bytes of a PNG. Nothing is shown for empty markup."""
        if not picture:
            return self
        if isinstance(picture, bytes):
            data = base64.b64encode(picture).decode()
            picture = f'<img alt="{_escape(caption)}" src="data:image/png;base64,{data}">'
        below = f"<figcaption>{_escape(caption)}</figcaption>" if caption else ""
        return self.html(f"<figure>{picture}{below}</figure>")

    def samples(self, samples: Sequence[Sample]) -> Report:
        """Prompts with the right answers and what was written before and after."""
        for sample in samples:
            rows = [("prompt", sample.prompt, "prompt")]
            if sample.before is not None:
                rows.append(("before", sample.before, "before"))
            if sample.after is not None:
                rows.append(("after", sample.after, "after"))
            rows += [("reference", text, "reference") for text in sample.references[:3]]
            body = "".join(
                f'<div class="who">{who}</div><div class="said {kind}">{_escape(text) or "<i>nothing</i>"}</div>'
                for who, text, kind in rows
            )
            self.html(f'<div class="sample">{body}</div>')
        return self

    def commands(self, commands: Sequence[str]) -> Report:
        """Lines for a terminal."""
        return self.html(f"<pre>{_escape(chr(10).join(commands))}</pre>") if commands else self

    def details(self, summary: str, content: Mapping[str, Any]) -> Report:
        """Settings, folded away."""
        rows = "".join(
            f"<tr><td>{_escape(str(key))}</td><td>{_escape(_cell(value))}</td></tr>" for key, value in content.items()
        )
        table = f'<div class="scroll"><table class="plain">{rows}</table></div>'
        return self.html(f"<details><summary>{_escape(summary)}</summary>{table}</details>")

    def html(self, markup: str) -> Report:
        """Markup as it is."""
        self._blocks.append(markup)
        return self

    def body(self) -> str:
        """The blocks so far, to be put into another page."""
        return "\n".join(self._blocks)

    def render(self) -> str:
        """The page."""
        style = resources.files("volvelle.train").joinpath("report.css").read_text(encoding="utf-8")
        subtitle = f'<p class="subtitle">{_escape(self.subtitle)}</p>' if self.subtitle else ""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_escape(self.title)}</title><style>{style}</style></head>\n"
            f"<body><main><header><h1>{_escape(self.title)}</h1>{subtitle}</header>\n"
            + self.body()
            + "\n</main></body></html>\n"
        )

    def write(self, path: Path) -> Path:
        """Write the page in one step."""
        write_atomic(path, self.render())
        return path


def begun(run: RunFolder, result: FitResult, subtitle: str) -> Report:
    """The head of a training's page."""
    report = Report(str(run.manifest.get("name", run.path.name)), subtitle=subtitle)
    if result.interrupted:
        report.text(f"Interrupted by {result.interrupted} after step {result.step} of {result.steps}.")
    return report


def tiles_of_work(result: FitResult) -> list[tuple[str, str, str]]:
    """How many steps a training took, and how long."""
    minutes, seconds = divmod(round(result.seconds), 60)
    most = f"of {result.steps:,}" if result.interrupted else ""
    return [("steps", f"{result.step:,}", most), ("time", f"{minutes}:{seconds:02d}", "")]


def ended(report: Report, run: RunFolder, commands: Sequence[str]) -> Path:
    """Write the page with its foot: commands to try, the run's options, what it ran on."""
    report.heading("Next").commands(commands)
    report.heading("Settings").details("Options (config.yaml)", run.config())
    report.details("Environment (env.json)", environment())
    return report.write(run.path / "report.html")


def training_curves(report: Report, records: Sequence[Mapping[str, Any]]) -> Report:
    """Charts of metrics.jsonl: every loss in one, then the gradient norms and the learning rates."""
    train = [r for r in records if r.get("event") == "train"]
    held = [r for r in records if r.get("event") == "evaluate"]
    losses = [_series(train, name, smooth=True) for name in _names(train, "loss")]
    if any("held_out_loss" in r for r in held):
        losses.append(Series("held out", _points(held, "held_out_loss"), dots=True))
    report.figure(line_chart(losses, y_label="loss"), "Loss. The faint trace is every logged step.")
    rates = [_series(train, name) for name in _names(train, "learning_rate")]
    norms = [_series(train, name, smooth=True) for name in _names(train, "gradient_norm")]
    pair = line_chart(norms, y_label="gradient norm", log_y=True, width=380), line_chart(rates, width=380)
    if all(pair):
        report.html(f'<div class="pair"><figure>{pair[0]}</figure><figure>{pair[1]}</figure></div>')
    return report


def _names(records: Sequence[Mapping[str, Any]], ending: str) -> list[str]:
    """Metric names that are `ending`, or a phase's name before it, in order of appearance."""
    names = (name for record in records for name in record)
    return list(dict.fromkeys(n for n in names if n == ending or n.endswith(f"_{ending}")))


def _series(records: Sequence[Mapping[str, Any]], name: str, *, smooth: bool = False) -> Series:
    return Series(name.replace("_", " "), _points(records, name), smooth=smooth)


def _points(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(float(r["step"]), float(r[name])) for r in records if isinstance(r.get(name), int | float)]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _escape(text: str) -> str:
    return html.escape(text)
