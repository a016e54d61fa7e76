"""report.html of a detector: figures, curves, precision over recall of each class, pictures, and the worst of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from volvelle.data.boxes import BoxFolder
from volvelle.data.masks_labels import Colour
from volvelle.data.text import spread
from volvelle.parts.metrics.box_matching import Picture
from volvelle.runs import RunFolder
from volvelle.train.charts import Series, line_chart
from volvelle.train.detect_measure import Measured, judged
from volvelle.train.detect_pictures import PANEL, WRONG, Drawn, resized_with_boxes
from volvelle.train.loop import FitResult
from volvelle.train.report import Report, begun, ended, tiles_of_work, training_curves
from volvelle.train.segment_pictures import colours_of, legend, png

NAMES = {
    "map_50": "mAP, IoU 0.5",
    "map": "mAP, IoU 0.5 to 0.95",
    "map_75": "mAP, IoU 0.75",
    "mar_100": "recall of 100",
    "voc07_map": "VOC 2007 mAP",
}
GREY: Colour = (150, 150, 150)


@dataclass(frozen=True)
class Page:
    """What the report shows: `found` was measured on `test`, None when interrupted; `where` names these pictures.

    Detections of less than `trusted` are not drawn.
    """

    classes: Sequence[str]
    test: BoxFolder
    where: str
    found: Measured | None
    trusted: float
    samples: int


def write_report(run: RunFolder, result: FitResult, page: Page, *, subtitle: str, commands: Sequence[str]) -> Path:
    """Write report.html into the run folder."""
    report = begun(run, result, subtitle)
    metrics = page.found.metrics if page.found else {}
    tiles = [(label, _percent(metrics[name]), "%") for name, label in NAMES.items() if name in metrics]
    report.tiles([*tiles, *tiles_of_work(result)])
    if page.found is not None:
        report.text(
            f"Measured on {len(page.test)} pictures: {page.where}. "
            "Crowds and difficult objects are left out of account."
        )
    records = run.metrics()
    training_curves(report.heading("Training"), records)
    curves = [_held(records, "map_50", "mAP at 0.5"), _held(records, "map", "mAP at 0.5 to 0.95")]
    report.figure(line_chart(curves, y_label="%"), "Mean average precision on the pictures set aside to watch by.")
    if page.found is not None:
        add_figures(report, page, page.found)
    return ended(report, run, commands)


def add_figures(report: Report, page: Page, found: Measured) -> None:
    """The table of classes, their curves of precision over recall, some pictures and the worst ones."""
    rows = [(name, boxes, *map(_percent, values)) for name, boxes, *values in found.rows(page.classes)]
    report.heading("Classes").table(("class", "boxes", "AP, %", "AP at 0.5, %", "recall of 100, %"), rows)
    kinds = [("small, up to 32²", "small"), ("medium, up to 96²", "medium"), ("large", "large")]
    sizes = [(label, *(_percent(found.metrics[f"{kind}_{name}"]) for kind in ("map", "mar"))) for label, name in kinds]
    report.table(("objects, pixels", "mAP, %", "recall of 100, %"), sizes)
    series = [
        Series(name, [(100 * recall, 100 * precision) for recall, precision in points])
        for name, points in found.curves(page.classes)
    ]
    report.figure(
        line_chart(series, x_label="recall, %", y_label="precision, %"), "Precision over recall, at an IoU of 0.5."
    )
    colours = colours_of(page.classes, ())
    report.heading("Pictures").html(legend(page.classes, colours))
    report.text(
        f"On the left what is there, on the right what was seen with a score of at least {page.trusted:.2f}. Thick and "
        "red: an object that was missed, a detection of nothing. Grey: ignored."
    )
    chosen = spread(range(len(page.test)), page.samples)
    for title, indices in (("", chosen), ("The worst, by their own F1", found.worst(page.samples, page.trusted))):
        if title and indices:
            report.heading(title)
        for index in indices:
            report.figure(_panels(page, found.pictures[index], index, colours), Path(page.test.source(index)).name)


def _panels(page: Page, picture: Picture, index: int, colours: Sequence[Colour]) -> bytes:
    """A PNG: the picture with what is there, and with what was seen."""
    image, _ = page.test[index]
    hits, missed = judged(picture, page.trusted)
    there, seen = list[Drawn](), list[Drawn]()
    for number, box in enumerate(picture.objects.tolist()):
        label, lost = int(picture.classes[number]), bool(missed[number])
        colour = WRONG if lost else GREY if picture.ignored[number] else colours[label]
        there.append(_drawn(box, colour, page.classes[label] if lost else "", lost))
    for number, box in enumerate(picture.boxes.tolist()):
        label, score, hit = int(picture.labels[number]), float(picture.scores[number]), bool(hits[number])
        if score >= page.trusted:
            colour = colours[label] if hit else WRONG
            seen.append(_drawn(box, colour, f"{score:.2f}" if hit else f"{page.classes[label]} {score:.2f}", not hit))
    panels = [resized_with_boxes(image, boxes, PANEL, letters=10) for boxes in (there, seen)]
    joined = Image.new("RGB", (2 * PANEL + 4, panels[0].height), (255, 255, 255))
    for number, panel in enumerate(panels):
        joined.paste(panel, (number * (PANEL + 4), 0))
    return png(joined.quantize(256, dither=Image.Dither.NONE))


def _drawn(box: Sequence[float], colour: Colour, word: str, wrong: bool) -> Drawn:
    x1, y1, x2, y2 = box
    return Drawn((x1, y1, x2, y2), colour, word, 3 if wrong else 1)


def _held(records: Sequence[Mapping[str, object]], name: str, label: str) -> Series:
    points = [
        (float(r["step"]), 100 * max(0.0, float(r[f"held_out_{name}"])))  # pyright: ignore[reportArgumentType]
        for r in records
        if r.get("event") == "evaluate" and isinstance(r.get(f"held_out_{name}"), int | float)
    ]
    return Series(label, points, dots=True)


def _percent(value: float) -> str:
    return "none" if value < 0 else f"{100 * value:.2f}"
