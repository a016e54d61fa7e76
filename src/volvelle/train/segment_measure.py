"""Measuring a segmenter on whole pictures with masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from volvelle.data.masks_augment import Whole
from volvelle.errors import VolvelleError
from volvelle.parts.metrics.boundary import boundary_counts, boundary_iou
from volvelle.parts.metrics.confusion import ConfusionMatrix
from volvelle.parts.metrics.overlap import (
    class_accuracy,
    class_iou,
    frequency_weighted_iou,
    mean_iou,
    mean_pixel_accuracy,
    pixel_accuracy,
)
from volvelle.systems.segmentation.inference import Looks, probabilities
from volvelle.systems.segmentation.model import Segmenter
from volvelle.train.precision import Kind, Precision


@dataclass(frozen=True)
class Measured:
    """The matrix of a data set and of each picture (n, k, k), and the figures that follow.

    metrics: `miou`, `pixel_accuracy`, `mean_pixel_accuracy`, `frequency_weighted_iou`, `miou_of_images` (the mean of
    the pictures' own), and `boundary_iou` where it was asked for. All lie in [0, 1].
    """

    images: Tensor
    metrics: dict[str, float]

    @property
    def matrix(self) -> Tensor:
        """(k, k): rows are the classes, columns what was predicted."""
        return self.images.sum(0)

    def rows(self, classes: Sequence[str]) -> list[tuple[str, float, float, float]]:
        """Of each class: its name, its share of the pixels, its IoU and its accuracy; NaN where it is absent."""
        share = self.matrix.sum(1).double() / self.matrix.sum().clamp(min=1)
        ious, hits = class_iou(self.matrix), class_accuracy(self.matrix)
        values = zip(classes, share.tolist(), ious.tolist(), hits.tolist(), strict=True)
        return [(name, part, iou, accuracy) for name, part, iou, accuracy in values]

    def worst(self, count: int) -> list[int]:
        """The pictures with the lowest mean IoU, worst first."""
        own = class_iou(self.images).nanmean(1).nan_to_num(2.0)
        return own.argsort()[: min(count, len(own))].tolist()


def measure(
    model: Segmenter,
    dataset: Whole,
    *,
    looks: Looks | None = None,
    precision: Kind = "fp32",
    outlines: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Predict every picture of the data set, one by one in its own size, and count.

    `looks` says how often each is looked at; `outlines` measures boundary IoU too. Raises VolvelleError when the model
    and the masks have different numbers of classes.
    """
    classes = len(dataset.folder.labels)
    if classes != len(model.classes):
        raise VolvelleError(f"the model knows {len(model.classes)} classes, and the masks have {classes}")
    device = next(model.parameters()).device
    numbers = Precision(precision, device)
    seen, edges = ConfusionMatrix(classes, per_image=True), list[tuple[Tensor, Tensor]]()
    training = model.training
    model.eval()
    try:
        for index in range(len(dataset)):
            pixels, mask = dataset[index]
            found = probabilities(model, pixels[None], looks, autocast=numbers.autocast())
            labels = found.argmax(1).to(torch.uint8).cpu()
            seen.update(labels, mask[None])
            if outlines:
                edges.append(boundary_counts(labels, mask[None], classes))
            if progress:
                progress(index + 1, len(dataset))
    finally:
        model.train(training)
    metrics = figures(seen)
    if outlines:
        both, either = (torch.cat(parts) for parts in zip(*edges, strict=True))
        metrics["boundary_iou"] = float(boundary_iou(both, either))
    return Measured(seen.images, metrics)


def figures(seen: ConfusionMatrix) -> dict[str, float]:
    """The usual figures of what was counted; a class that occurs nowhere is left out of means."""
    return {
        "miou": float(mean_iou(seen.matrix)),
        "pixel_accuracy": float(pixel_accuracy(seen.matrix)),
        "mean_pixel_accuracy": float(mean_pixel_accuracy(seen.matrix)),
        "frequency_weighted_iou": float(frequency_weighted_iou(seen.matrix)),
        "miou_of_images": float(mean_iou(seen.images, average="image")),
    }
