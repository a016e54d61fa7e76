"""Measuring a detector on whole pictures with boxes, in the pixels of the pictures themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from volvelle.data.boxes_augment import Fitted, collate_views
from volvelle.errors import VolvelleError
from volvelle.parts.metrics.box_matching import Picture, match_voc, matched, overlaps
from volvelle.parts.metrics.mean_average_precision import MeanAveragePrecision
from volvelle.systems.detection.inference import detect
from volvelle.systems.detection.model import Detector
from volvelle.systems.modes import evaluating
from volvelle.train.precision import Kind, Precision

BATCH = 8
"""Pictures looked at together."""
FIGURES = (
    "map", "map_50", "map_75", "map_small", "map_medium", "map_large",
    "mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large",
)  # fmt: skip
"""COCO's twelve, as they are called here."""
UNSURE = 0.5
"""The score from which on a detection is trusted where nothing could be chosen by."""


@dataclass(frozen=True)
class Measured:
    """What was found in the pictures of a data set, and the figures that follow, all in [0, 1], or -1 for none.

    metrics: COCO's twelve (`map`, `map_50`, …, see `MeanAveragePrecision`), `voc_map` and `voc07_map` at an IoU of 0.5.
    """

    figures: MeanAveragePrecision
    metrics: dict[str, float]

    @property
    def pictures(self) -> Sequence[Picture]:
        """Detections and objects of each picture."""
        return self.figures.pictures

    def rows(self, classes: Sequence[str]) -> list[tuple[str, int, float, float, float]]:
        """Of each class: its name, its boxes, AP, AP at 0.5, recall of 100 detections; -1 where it has no box."""
        found = self.figures.compute()
        labels, rows = found["classes"].tolist(), []
        for number, name in enumerate(classes):
            boxes = sum(int(((p.classes == number) & ~p.ignored).sum()) for p in self.pictures)
            at = labels.index(number) if number in labels else None
            kinds = ("map_per_class", "map_50_per_class", "mar_100_per_class")
            rows.append((name, boxes, *(-1.0 if at is None else float(found[kind][at]) for kind in kinds)))
        return rows

    def curves(self, classes: Sequence[str]) -> list[tuple[str, list[tuple[float, float]]]]:
        """Of each class with boxes: (recall, precision) at an IoU of 0.5, at COCO's 101 recalls while they last."""
        precision, _, labels = self.figures.tables()
        curves = []
        for at, label in enumerate(labels.tolist()):
            values = precision[0, :, at, 0].tolist()
            points = [(number / (len(values) - 1), value) for number, value in enumerate(values) if value > 0]
            if points:
                curves.append((classes[label], points))
        return curves

    @cached_property
    def trusted(self) -> float:
        """The score from which on detections, taken together, have the best F1 = 2 hits / (detections + objects)."""
        found = matched(self.pictures, self.figures.classes(), lambda cells: match_voc(cells, 0.5))
        positives = sum(int((~picture.ignored).sum()) for picture in self.pictures)
        scores, order = found.scores[~found.ignored].sort(descending=True)
        if not len(scores) or not positives:
            return UNSURE
        hits = found.hits[~found.ignored][order].cumsum(0)
        f1 = 2 * hits / (torch.arange(1, len(scores) + 1) + positives)
        # Of equal scores all or none.
        last = torch.cat((scores[1:] < scores[:-1], torch.ones(1, dtype=torch.bool)))
        return float(scores[torch.where(last, f1, -1.0).argmax()])

    def worst(self, count: int, score: float) -> list[int]:
        """The pictures with the lowest F1 at that score, worst first, without those where all is right."""
        values = []
        for number, picture in enumerate(self.pictures):
            hit, missed = judged(picture, score)
            sure = int((picture.scores >= score).sum())
            wrong = sure - int(hit.sum()) + int(missed.sum())
            values.append((1 - wrong / max(1, sure + len(missed)), number, wrong))
        return [number for _, number, wrong in sorted(values) if wrong][:count]


def judged(picture: Picture, score: float) -> tuple[Tensor, Tensor]:
    """Of detections with that score: hits (n,), for others False; of objects: missed (m,), for ignored ones False."""
    sure = picture.scores >= score
    same = (picture.labels[:, None] == picture.classes[None]) & sure[:, None]
    crowd = torch.zeros(1, len(picture.classes), dtype=torch.bool)
    near = (overlaps(picture.boxes[None], picture.objects[None], crowd)[0] >= 0.5) & same
    hit, taken = torch.zeros_like(sure), picture.ignored.clone()
    for number in picture.scores.argsort(descending=True, stable=True).tolist():
        free = torch.nonzero(near[number] & ~taken).flatten()
        if len(free):
            hit[number] = taken[free[0]] = True
        elif bool((near[number] & picture.ignored).any()):
            hit[number] = True
    return hit, ~taken


def measure(
    model: Detector,
    dataset: Fitted,
    *,
    precision: Kind = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Look at every picture of the data set once, and count. VolvelleError where its classes are not the model's."""
    folder = dataset.folder
    if len(folder.classes) != len(model.classes):
        raise VolvelleError(f"the model knows {len(model.classes)} classes, and the boxes have {len(folder.classes)}")
    numbers = Precision(precision, next(model.parameters()).device)
    figures = MeanAveragePrecision()
    with evaluating(model):
        for start in range(0, len(dataset), BATCH):
            chosen = range(start, min(start + BATCH, len(dataset)))
            batch = collate_views([dataset[index] for index in chosen])
            with numbers.autocast():
                found = detect(model, batch["images"], batch["sizes"].to(numbers.device))
            for row, index in enumerate(chosen):
                kept, boxes = found.mask[row], folder.boxes[index]
                corners = dataset.fit.back(found.boxes[row][kept].float().cpu(), *folder.sizes[index])
                seen = {"boxes": corners, "scores": found.scores[row][kept], "labels": found.labels[row][kept]}
                there = {"boxes": boxes.corners, "labels": boxes.labels, "iscrowd": boxes.ignored, "area": boxes.areas}
                figures.update([seen], [there])
            if progress:
                progress(chosen[-1] + 1, len(dataset))
    return Measured(figures, metrics_of(figures))


def metrics_of(figures: MeanAveragePrecision) -> dict[str, float]:
    """COCO's twelve figures and VOC's two."""
    found = figures.compute()
    metrics = {name: float(found[name]) for name in FIGURES}
    metrics["voc_map"] = float(figures.voc()["map"])
    metrics["voc07_map"] = float(figures.voc(interpolation="11-point")["map"])
    return metrics
