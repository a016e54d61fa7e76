"""report.html of a classifier: figures, curves, classes, the confusion matrix, and the worst misses as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from volvelle.data.images import to_rgb
from volvelle.data.images_labelled import Labelled
from volvelle.parts.metrics.overlap import class_accuracy
from volvelle.runs import RunFolder
from volvelle.train.charts import Series, line_chart
from volvelle.train.classify_objective import Measured
from volvelle.train.loop import FitResult
from volvelle.train.report import Report, begun, ended, tiles_of_work, training_curves
from volvelle.train.segment_pictures import confusion_picture, png

SIDE = 180
"""The longer side of a picture in the report, in pixels."""
MOST = 40
"""The most classes whose confusion matrix is drawn."""


@dataclass(frozen=True)
class Page:
    """What the report shows: `found` is what was measured on `held`, picture by picture; None when interrupted."""

    classes: Sequence[str]
    held: Labelled
    found: Measured | None
    before: Mapping[str, float]
    samples: int


def write_report(run: RunFolder, result: FitResult, page: Page, *, subtitle: str, commands: Sequence[str]) -> Path:
    """Write report.html into the run folder."""
    report = begun(run, result, subtitle)
    report.tiles([*_tiles(page), *tiles_of_work(result)])
    if page.found is not None:
        report.text(f"Measured on {len(page.found.labels):,} pictures that were not trained on.")
    records = run.metrics()
    training_curves(report.heading("Training"), records)
    report.figure(line_chart(_accuracies(records), y_label="%"), "Accuracy, of the pictures trained on and of others.")
    if page.found is not None:
        _add_classes(report, page.classes, page.found)
        _add_misses(report, page, page.found)
    return ended(report, run, commands)


def _tiles(page: Page) -> list[tuple[str, str, str]]:
    after = page.found.metrics if page.found else {}
    names = {"accuracy": "accuracy", "top5": "among the first five"}
    return [
        (label, f"{100 * after[name]:.1f} %", f"before: {100 * page.before[name]:.1f} %" if name in page.before else "")
        for name, label in names.items()
        if name in after
    ]


def _accuracies(records: Sequence[Mapping[str, object]]) -> list[Series]:
    def points(event: str, ending: str) -> list[tuple[float, float]]:
        chosen = (record for record in records if record.get("event") == event)
        return [
            (float(record["step"]), 100 * float(value))  # pyright: ignore[reportArgumentType]
            for record in chosen
            for name, value in record.items()
            if name.endswith(ending) and isinstance(value, int | float)
        ]

    trained, held = points("train", "accuracy"), points("evaluate", "held_out_accuracy")
    return [Series("trained on", trained, smooth=True), Series("held out", held, dots=True)]


def _add_classes(report: Report, classes: Sequence[str], found: Measured) -> None:
    shares = class_accuracy(found.matrix).tolist()
    counts = found.matrix.sum(1).tolist()
    rows = [
        (name, count, round(100 * share, 2) if share == share else "none here")
        for name, count, share in zip(classes, counts, shares, strict=True)
    ]
    report.heading("Classes").table(("class", "pictures", "of them found, %"), rows)
    if len(classes) <= MOST:
        report.figure(
            confusion_picture(found.matrix, classes),
            "Of the pictures of each row's class, the percentage taken for each column's.",
        )


def _add_misses(report: Report, page: Page, found: Measured) -> None:
    worst, held, classes = found.worst(page.samples), page.held, page.classes
    if not worst:
        return
    report.heading("The worst misses").text("Wrong with the greatest confidence, worst first.")
    for index in worst:
        image, label = held[index]
        seen, sure = classes[int(found.predicted[index])], float(found.confidence[index])
        caption = f"{Path(held.source(index)).name}: {classes[label]}, taken for {seen} ({100 * sure:.0f} %)"
        report.figure(_thumbnail(image), caption)


def _thumbnail(image: Image.Image) -> bytes:
    factor = SIDE / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    shown = to_rgb(image).resize(size, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST)
    return png(shown.quantize(128, dither=Image.Dither.NONE))
