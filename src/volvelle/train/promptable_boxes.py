"""Measuring Segment Anything where only boxes are known: does a box's mask stay inside it, and apart from the others'?

It is no IoU with objects: nobody drew their outlines. What can be said of k boxes of a picture and their masks:

    inside     |mask in its box| / |mask|                  1 where nothing spills out
    fit        IoU of the mask's own box with its box      1 where the mask reaches all four sides
    overlap    |A and B| / min(|A|, |B|)                   of neighbours, pairs whose boxes meet; so of the boxes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from volvelle.data.boxes import BoxFolder
from volvelle.data.masks_labels import voc_colour
from volvelle.systems.modes import evaluating
from volvelle.systems.segmentation.sam.model import Sam
from volvelle.systems.segmentation.sam.promptable import Promptable
from volvelle.train.detect_pictures import Drawn, draw_boxes
from volvelle.train.precision import Kind, Precision
from volvelle.train.promptable_pictures import panels, veiled

APART = 0.1
"""The overlap up to which two neighbours count as separated."""


@dataclass(frozen=True)
class Boxed:
    """What was measured: a row a box (inside, fit), a row a pair of neighbours (overlap of masks, of boxes), figures.

    metrics: `inside`, `fit`, `empty` (the share of boxes without a mask), `overlap`, `boxes_overlap`, `separated` (the
    share of neighbours whose masks overlap by 0.1 at most); -1 where there was nothing to measure.
    """

    boxes: np.ndarray
    pairs: np.ndarray
    empty: int

    @property
    def metrics(self) -> dict[str, float]:
        """The means."""
        count = len(self.boxes) + self.empty
        return {
            "inside": _mean(self.boxes[:, 0]),
            "fit": _mean(self.boxes[:, 1]),
            "empty": self.empty / count if count else -1.0,
            "overlap": _mean(self.pairs[:, 0]),
            "boxes_overlap": _mean(self.pairs[:, 1]),
            "separated": _mean(self.pairs[:, 0] <= APART),
        }


def masks_of_boxes(prompted: Promptable, image: Image.Image, corners: torch.Tensor) -> np.ndarray:
    """The masks bool (k, y, x) of boxes (k, 4)."""
    if not len(corners):
        return np.zeros((0, image.height, image.width), dtype=bool)
    return prompted.predict(prompted.embed(image), boxes=corners, multimask=False).masks[:, 0].cpu().numpy()


def measure_boxes(
    model: Sam, folder: BoxFolder, *, precision: Kind = "fp32", progress: Callable[[int, int], None] | None = None
) -> Boxed:
    """Ask for the mask of every box of every picture."""
    numbers, prompted = Precision(precision, next(model.parameters()).device), Promptable(model)
    boxes, pairs, empty = list[tuple[float, float]](), list[tuple[float, float]](), 0
    with evaluating(model), torch.no_grad():
        for index in range(len(folder)):
            image, there = folder[index]
            with numbers.autocast():
                masks = masks_of_boxes(prompted, image, there.corners)
            corners = [(x1, y1, x2, y2) for x1, y1, x2, y2 in there.corners.tolist()]
            for mask, box in zip(masks, corners, strict=True):
                if mask.any():
                    boxes.append(one_box(mask, box))
                else:
                    empty += 1
            pairs += neighbours(masks, corners)
            if progress:
                progress(index + 1, len(folder))
    return Boxed(np.array(boxes).reshape(-1, 2), np.array(pairs).reshape(-1, 2), empty)


def one_box(mask: np.ndarray, box: tuple[float, float, float, float]) -> tuple[float, float]:
    """How much of a mask lies inside its box, and how well its own box fits it.

    >>> mask = np.zeros((4, 8), dtype=bool)
    >>> mask[0:2, 0:4] = True
    >>> one_box(mask, (0, 0, 2, 4))
    (0.5, 0.3333333333333333)
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    own = float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
    x1, y1, x2, y2 = (round(value) for value in box)
    inside = float(mask[y1:y2, x1:x2].sum() / mask.sum())
    both = _area(_meet(own, box))
    return inside, both / (_area(own) + _area(box) - both)


def neighbours(masks: np.ndarray, boxes: Sequence[tuple[float, float, float, float]]) -> list[tuple[float, float]]:
    """(overlap of the masks, overlap of the boxes) of each pair whose boxes meet and that both have masks."""
    sizes, found = masks.sum((1, 2)), []
    for i in range(len(boxes)):
        for j in range(i):
            shared = _area(_meet(boxes[i], boxes[j]))
            if shared > 0 and min(sizes[i], sizes[j]) > 0:
                both = float((masks[i] & masks[j]).sum() / min(sizes[i], sizes[j]))
                found.append((both, shared / min(_area(boxes[i]), _area(boxes[j]))))
    return found


def picture_of_boxes(model: Sam, folder: BoxFolder, index: int) -> bytes:
    """A PNG: the picture with its boxes, and with the masks of these, each in a colour of its own."""
    image, there = folder[index]
    with evaluating(model):
        masks = masks_of_boxes(Promptable(model), image, there.corners)
    drawn = [
        Drawn((x1, y1, x2, y2), voc_colour(number % 20 + 1))
        for number, (x1, y1, x2, y2) in enumerate(there.corners.tolist())
    ]
    answered = image
    for mask, one in zip(masks, drawn, strict=True):
        answered = veiled(answered, mask, one.colour)
    return panels([draw_boxes(image, drawn), answered])


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> tuple[float, ...]:
    return max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])


def _area(box: tuple[float, ...]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else -1.0
