"""Shapes of anchors from the data: k-means over the widths and heights of boxes, with 1 - IoU as the distance.

    d(box, centre) = 1 - IoU of the two, laid over each other at their centres

Redmon & Farhadi 2017, "YOLO9000: Better, Faster, Stronger", section 2 ("Dimension Clusters"). Squared distances would
give large boxes the last word; this one asks of small ones as much. Classes are clustered one by one where there are
few, so that a rare class of small objects has shapes of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from volvelle.data.boxes import BoxFolder
from volvelle.data.boxes_augment import Fit

ROUNDS, STARTS = 100, 5
LEAST = 2
"""The fewest shapes that a class of its own is worth."""


def shape_iou(shapes: Tensor, centres: Tensor) -> Tensor:
    """IoU (n, k) of boxes of these widths and heights (n, 2) and (k, 2), laid over each other at their centres.

    >>> shape_iou(torch.tensor([[10.0, 20.0]]), torch.tensor([[10.0, 10.0], [10.0, 20.0]]))
    tensor([[0.5000, 1.0000]])
    """
    both = torch.minimum(shapes[:, None], centres[None]).prod(-1)
    return both / (shapes.prod(-1)[:, None] + centres.prod(-1)[None] - both)


def cluster_shapes(shapes: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """At most `count` shapes (k, 2), by area, around which the widths and heights (n, 2) gather.

    The best of some seeded starts (k-means++ with this distance). Fewer where there are fewer different shapes.
    Raises ValueError without shapes, for a count below 1, and for sides that are not above 0.
    """
    shapes = shapes.double()
    if shapes.ndim != 2 or shapes.shape[1] != 2 or not len(shapes) or count < 1 or not bool((shapes > 0).all()):
        raise ValueError(
            f"cluster_shapes: wants (n, 2) widths and heights above 0 and count >= 1, got {tuple(shapes.shape)} "
            f"and {count}"
        )
    distinct = shapes.unique(dim=0)
    if len(distinct) <= count:
        return _by_area(distinct)
    draw = torch.Generator().manual_seed(seed)
    found = [_lloyd(shapes, _spread_out(shapes, count, draw)) for _ in range(STARTS)]
    return _by_area(max(found, key=lambda centres: float(shape_iou(shapes, centres).amax(1).mean())))


def suggest_anchors(folder: BoxFolder, fit: Fit, count: int, *, seed: int = 0) -> Tensor:
    """`count` shapes (k, 2), widths and heights in pixels of fitted pictures, for the boxes of a folder.

    With few classes each has its own, an equal number, and the most frequent one the rest; with many, all boxes are
    clustered together. Raises ValueError where no box is to be found.
    """
    sides = [
        fit.boxes(boxes.corners, *size)[~boxes.ignored] for boxes, size in zip(folder.boxes, folder.sizes, strict=True)
    ]
    shapes = torch.cat([corners[:, 2:] - corners[:, :2] for corners in sides]).clamp(min=1.0)
    labels = torch.cat([boxes.labels[~boxes.ignored] for boxes in folder.boxes])
    parts = [cluster_shapes(shapes[chosen], k, seed=seed) for chosen, k in _shares(labels, folder.counts, count)]
    return _by_area(torch.cat(parts))


def best_overlap(folder: BoxFolder, fit: Fit, anchors: Tensor) -> float:
    """The mean IoU of the boxes of a folder with the shape that suits each best."""
    pairs = zip(folder.boxes, folder.sizes, strict=True)
    corners = torch.cat([fit.boxes(boxes.corners, *size)[~boxes.ignored] for boxes, size in pairs]).double()
    return float(shape_iou(corners[:, 2:] - corners[:, :2], anchors.double()).amax(1).mean())


def _shares(labels: Tensor, counts: Sequence[int], count: int) -> list[tuple[Tensor, int]]:
    """Which boxes are clustered together, and into how many shapes."""
    present = [number for number, boxes in enumerate(counts) if boxes]
    if not present:
        raise ValueError("suggest_anchors: there is no box to be found")
    each = count // len(present)
    if each < LEAST:
        return [(torch.ones_like(labels, dtype=torch.bool), count)]
    most = max(present, key=lambda number: counts[number])
    rest = count - each * len(present)
    return [(labels == number, each + (rest if number == most else 0)) for number in present]


def _spread_out(shapes: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """k-means++: each further centre is a shape, drawn by its squared distance to the nearest one so far."""
    centres = shapes[torch.randint(len(shapes), (1,), generator=draw)]
    while len(centres) < count:
        far = (1 - shape_iou(shapes, centres).amax(1)).clamp(min=0).square()
        centres = torch.cat((centres, shapes[torch.multinomial(far, 1, generator=draw)]))
    return centres


def _lloyd(shapes: Tensor, centres: Tensor) -> Tensor:
    """Move each centre to the mean of the shapes nearest to it until nothing changes; an empty one stays."""
    for _ in range(ROUNDS):
        nearest = shape_iou(shapes, centres).argmax(1)
        counts = torch.bincount(nearest, minlength=len(centres)).clamp(min=1)[:, None]
        moved = torch.zeros_like(centres).index_add_(0, nearest, shapes) / counts
        moved = torch.where((torch.bincount(nearest, minlength=len(centres)) > 0)[:, None], moved, centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _by_area(shapes: Tensor) -> Tensor:
    return shapes[shapes.prod(1).argsort(stable=True)]
