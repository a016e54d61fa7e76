"""Boundary IoU: how well the outlines of regions agree.

Cheng et al. 2021, "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", equation 2:

    Boundary IoU(G, P) = |(G_d ∩ G) ∩ (P_d ∩ P)| / |(G_d ∩ G) ∪ (P_d ∩ P)|

G and P are the region in the target and in the prediction, G_d ∩ G its pixels within d of its outline: those that d
erosions by a 3 x 3 square take away. What lies beyond the image counts as outside, so a region's edge on the border of
the image is outline too. Mask IoU hardly notices the outline of a large region; this does.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

from volvelle.export import export
from volvelle.parts.metrics.overlap import Absent, Average, mean_over_classes


@export("functional.boundary_counts")
def boundary_counts(
    preds: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    ignore_index: int | None = 255,
    dilation_ratio: float = 0.02,
) -> tuple[Tensor, Tensor]:
    """Return the sizes (n, num_classes) int64 of the intersection and of the union of both outlines, an image.

    preds and target are integer label maps (n, y, x). d is `dilation_ratio` of the image's diagonal, rounded, at least
    1 pixel. Ignored pixels count nowhere, and no outline begins at them: they belong to every region while outlines are
    sought. Counts of batches and of ranks may be added up.

    Raises TypeError for floating-point maps, ValueError for unequal shapes and maps that are not (n, y, x).

    Cheng et al. 2021, section 4.

    >>> square = torch.zeros(1, 8, 8, dtype=torch.uint8)
    >>> square[:, 2:6, 2:6] = 1
    >>> [counts[0].tolist() for counts in boundary_counts(square, square, 2)]
    [[48, 12], [48, 12]]
    """
    _check_maps(preds, target, dilation_ratio)
    n, y, x = target.shape
    d = max(1, round(dilation_ratio * math.hypot(y, x)))
    void = torch.zeros_like(target, dtype=torch.bool) if ignore_index is None else target == ignore_index
    both = torch.zeros(n, num_classes, dtype=torch.int64, device=target.device)
    either = torch.zeros_like(both)
    for c in range(num_classes):
        ours, theirs = (_outline(labels == c, void, d) for labels in (preds, target))
        both[:, c] = (ours & theirs).sum((1, 2))
        either[:, c] = (ours | theirs).sum((1, 2))
    return both, either


@export("functional.boundary_iou")
def boundary_iou(
    intersection: Tensor,
    union: Tensor,
    *,
    average: Average = "dataset",
    absent: Absent = "skip",
    without: Collection[int] = (),
) -> Tensor:
    """Return the mean boundary IoU, a number, from the counts (n, k) of `boundary_counts`, one row an image.

    A class is absent when neither map has an outline of it. `average`, `absent` and `without` are those of `mean_iou`.

    Cheng et al. 2021, equation 2.

    >>> boundary_iou(torch.tensor([[6, 0]]), torch.tensor([[8, 0]]))
    tensor(0.7500, dtype=torch.float64)
    """
    if intersection.shape != union.shape or union.ndim != 2:
        raise ValueError(
            "boundary_iou: intersection and union must both be (n, k), got "
            f"{tuple(intersection.shape)} and {tuple(union.shape)}"
        )
    if average not in ("dataset", "image", "pair"):
        raise ValueError(f"boundary_iou: average must be one of dataset, image, pair, got {average!r}")
    if average == "dataset":
        intersection, union = intersection.sum(0, keepdim=True), union.sum(0, keepdim=True)
    values = torch.where(union == 0, torch.nan, intersection.double() / union.double())
    return mean_over_classes(values, average=average, absent=absent, without=without)


def _outline(region: Tensor, void: Tensor, d: int) -> Tensor:
    """The known pixels of the region (n, y, x) from which something else is at most d away, along either axis."""
    other = ~(region | void)
    # d erosions by a 3 x 3 square are one by a square of 2 d + 1, and that is one along each axis. Padding by what is
    # not the region puts an outline on the border of the image.
    near = F.pad(other.to(torch.float32), (d, d, d, d), value=1.0)[:, None]
    near = F.max_pool2d(F.max_pool2d(near, (1, 2 * d + 1), stride=1), (2 * d + 1, 1), stride=1)[:, 0]
    return region & ~void & (near > 0)


def _check_maps(preds: Tensor, target: Tensor, dilation_ratio: float) -> None:
    for name, labels in (("preds", preds), ("target", target)):
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"boundary_counts: {name} must hold class numbers (integers), got {labels.dtype}")
    if preds.shape != target.shape or target.ndim != 3:
        raise ValueError(
            "boundary_counts: preds and target must both be (n, y, x), got "
            f"{tuple(preds.shape)} and {tuple(target.shape)}"
        )
    if dilation_ratio <= 0:
        raise ValueError(f"boundary_counts: dilation_ratio must be above 0, got {dilation_ratio}")
