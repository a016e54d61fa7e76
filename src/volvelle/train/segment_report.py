"""report.html of a segmenter: figures, curves, classes, the confusion matrix, pictures, and the worst of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from volvelle.data.images import to_tensor
from volvelle.data.text import spread
from volvelle.runs import RunFolder
from volvelle.systems.segmentation.inference import labels
from volvelle.systems.segmentation.model import Segmenter
from volvelle.train.charts import Series, line_chart
from volvelle.train.loop import FitResult
from volvelle.train.report import Report, begun, ended, tiles_of_work, training_curves
from volvelle.train.segment_measure import Measured
from volvelle.train.segment_pictures import colours_of, confusion_picture, legend, row_of_panels

if TYPE_CHECKING:
    from volvelle.data.masks import MaskFolder
    from volvelle.train.sets import Sets

NAMES = {
    "miou": "mean IoU",
    "miou_of_looks": "mean IoU, all looks",
    "pixel_accuracy": "pixel accuracy",
    "mean_pixel_accuracy": "mean accuracy",
    "frequency_weighted_iou": "FW IoU",
    "boundary_iou": "boundary IoU",
}


def write_report(
    run: RunFolder,
    result: FitResult,
    model: Segmenter,
    sets: Sets[MaskFolder],
    *,
    found: Measured | None,
    after: dict[str, float],
    samples: int,
    subtitle: str,
    commands: Sequence[str],
) -> Path:
    """Write the page; `found` and `after` are what was measured on `sets.test`, nothing yet when interrupted."""
    report = begun(run, result, subtitle)
    tiles = [(label, f"{100 * after[name]:.2f}", "%") for name, label in NAMES.items() if name in after]
    report.tiles([*tiles, *tiles_of_work(result)])
    if found is not None:
        report.text(
            f"Measured on {len(sets.test)} pictures: {sets.where}. Void pixels are left out, classes that occur "
            "nowhere too; IoU is that of the whole set. The best moment was chosen on "
            f"{len(sets.selection)} training pictures that were not trained on."
        )
    records = run.metrics()
    training_curves(report.heading("Training"), records)
    held = [r for r in records if r.get("event") == "evaluate" and isinstance(r.get("held_out_miou"), int | float)]
    points = [(float(r["step"]), 100 * float(r["held_out_miou"])) for r in held]
    report.figure(line_chart([Series("mean IoU of the pictures set aside", points, dots=True)], y_label="%"))
    if found is not None:
        add_figures(report, model, sets.test, found, samples)
    return ended(report, run, commands)


def add_figures(report: Report, model: Segmenter, pictures: MaskFolder, found: Measured, samples: int) -> None:
    """The table of classes, the confusion matrix, some pictures and the worst ones."""
    rows = [(name, *(_percent(value) for value in values)) for name, *values in found.rows(model.classes)]
    report.heading("Classes").table(("class", "share of pixels, %", "IoU, %", "accuracy, %"), rows)
    report.figure(
        confusion_picture(found.matrix, model.classes),
        "Of the pixels of each row's class, the percentage seen as each column's.",
    )
    colours = colours_of(model.classes, model.config.colours)
    report.heading("Pictures").html(legend(model.classes, colours))
    report.text("From left to right: the picture, what is there, what was seen, and in white where they differ.")
    for title, chosen in (
        ("", spread(range(len(pictures)), samples)),
        ("The worst, by their own mean IoU", found.worst(samples)),
    ):
        if title and chosen:
            report.heading(title)
        for index in chosen:
            report.figure(_panels(model, pictures, index), Path(pictures.source(index)).name)


def seen_in(model: Segmenter, pixels: torch.Tensor) -> np.ndarray:
    """The classes (y, x) that the model sees in one picture uint8 (3, y, x)."""
    return labels(model, pixels[None])[0].cpu().numpy()


def _panels(model: Segmenter, pictures: MaskFolder, index: int) -> bytes:
    image, truth = pictures[index]
    colours = colours_of(model.classes, model.config.colours)
    return row_of_panels(image, truth, seen_in(model, to_tensor(image)), colours)


def _percent(value: float) -> float | str:
    return "absent" if value != value else round(100 * value, 2)
