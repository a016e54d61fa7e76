"""report.html of a promptable model: figures, the curve by clicks, classes, pictures, and the worst of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from volvelle.data.text import spread
from volvelle.runs import RunFolder
from volvelle.systems.segmentation.sam.model import Sam
from volvelle.train.charts import Series, line_chart
from volvelle.train.loop import FitResult
from volvelle.train.promptable_measure import Measured, Seen, replay
from volvelle.train.promptable_pictures import panels, veiled, with_clicks
from volvelle.train.report import Report, begun, ended, tiles_of_work, training_curves

if TYPE_CHECKING:
    from volvelle.data.promptable import ObjectFolder
    from volvelle.train.sets import Sets

MOST = 5
"""Clicks that pictures show."""


def write_report(
    run: RunFolder,
    result: FitResult,
    model: Sam,
    sets: Sets[ObjectFolder],
    *,
    found: Measured | None,
    samples: int,
    subtitle: str,
    commands: Sequence[str],
) -> Path:
    """Write the page; `found` is what was measured on `sets.test`, nothing yet when interrupted."""
    report = begun(run, result, subtitle)
    report.tiles([*(tiles_of(found.metrics) if found else []), *tiles_of_work(result)])
    if found is not None:
        report.text(
            f"Measured on {len(found.objects):,} objects in {len(sets.test)} pictures: {sets.where}. The first click "
            "is the middle of the object, each further one the middle of the largest error. After one click the mask "
            "is the one of three that the model itself ranks first. Void pixels are left out; means are over objects. "
            f"The best moment was chosen on {len(sets.selection)} training pictures that were not trained on."
        )
        add_figures(report, found, sets.test.classes)
    training_curves(report.heading("Training"), run.metrics())
    report.figure(line_chart(_held_out(run), y_label="%"))
    if found is not None:
        add_pictures(report, model, sets.test, found, samples)
    return ended(report, run, commands)


def _held_out(run: RunFolder) -> list[Series]:
    """IoU on the pictures set aside, by one click and by a box, over the steps."""
    held = [r for r in run.metrics() if r.get("event") == "evaluate"]
    found = []
    for key, name in (("held_out_iou_1", "after one click"), ("held_out_iou_box", "by a box")):
        points = [(float(r["step"]), 100 * float(r[key])) for r in held if isinstance(r.get(key), float)]
        found.append(Series(f"IoU {name}, pictures set aside", points, dots=True))
    return found


def tiles_of(metrics: dict[str, float]) -> list[tuple[str, str, str]]:
    """The main figures of `Measured.metrics`."""
    names = {"best_of_three": "best of three", "single": "the clear-prompt mask", "iou_box": "by a box"}
    for name in metrics:
        if name.startswith("iou_") and name != "iou_box":
            count = int(name.removeprefix("iou_"))
            names[name] = f"IoU, {count} click{'s' if count > 1 else ''}"
    order = sorted(metrics, key=lambda name: not names.get(name, "").startswith("IoU"))
    return [(names[name], f"{100 * metrics[name]:.2f}", "%") for name in order if name in names]


def add_figures(report: Report, found: Measured, classes: Sequence[str]) -> None:
    """The curve by clicks, and the table of classes."""
    most = max((len(one.ious) for one in found.objects), default=0)
    means = [sum(one.ious[i] for one in found.objects) / len(found.objects) for i in range(most)]
    curve = Series("mean IoU", [(i + 1, 100 * mean) for i, mean in enumerate(means)], dots=True)
    report.heading("By clicks").figure(line_chart([curve], x_label="clicks", y_label="%"))
    rows = [
        (name, count, *(round(100 * value, 1) if value == value else "not measured" for value in values))
        for name, count, *values in found.rows(classes)
    ]
    report.table(("class", "objects", "one click, %", f"{most} clicks, %", "best of three, %"), rows)


def add_pictures(report: Report, model: Sam, pictures: ObjectFolder, found: Measured, samples: int) -> None:
    """Some objects and the worst ones, after the first and the last click."""
    report.heading("Pictures")
    report.text(
        "From left to right: what is there, with the first click; the answer to it; the answer to all clicks, green "
        "ones for the object and red ones against it."
    )
    for title, chosen in (("", spread(found.objects, samples)), ("The worst", found.worst(samples))):
        if title and chosen:
            report.heading(title)
        for one in chosen:
            name = pictures.classes[one.label]
            shown = f"{Path(pictures.source(one.picture)).name}, {name}: IoU {one.ious[0]:.2f}"
            last = min(len(one.ious), MOST)
            more = f", after {last} clicks {one.ious[last - 1]:.2f}" if last > 1 else ""
            report.figure(_panels(model, pictures, one, last), shown + more)


def _panels(model: Sam, pictures: ObjectFolder, one: Seen, last: int) -> bytes:
    image, objects = pictures[one.picture]
    masks = replay(model, image, one.clicks[:last])
    truth = with_clicks(veiled(image, objects.mask(one.index), (64, 160, 255)), one.clicks[:1])
    first = with_clicks(veiled(image, masks[0]), one.clicks[:1])
    return panels([truth, first, with_clicks(veiled(image, masks[-1]), one.clicks[:last])])
