"""Pixel accuracy, mean pixel accuracy, mean IoU and frequency-weighted IoU, as formulas of a confusion matrix.

With n_ij the pixels of class i predicted as class j and t_i = Σ_j n_ij those of class i (Long et al. 2015, "Fully
Convolutional Networks for Semantic Segmentation", section 5):

    PA = Σ_i n_ii / Σ_i t_i        MPA = mean_i n_ii / t_i
    IoU_i = n_ii / (t_i + Σ_j n_ji - n_ii)        MIoU = mean_i IoU_i        FWIoU = Σ_i t_i IoU_i / Σ_i t_i

Three things that libraries decide silently, and differently, are arguments here:

- `average`: "dataset" adds up all images before any quotient (VOC, Cityscapes, CamVid and most papers); "image" makes
  the mean of each image's own value (Csurka et al. 2013); "pair" the mean over all (image, class) pairs.
- `absent`: what a class without a value adds to a mean (IoU: it is neither in the target nor in the prediction).
  "skip" leaves it out; "zero" and "one" count it so.
- `without`: classes left out of the mean, such as a background; their pixels still count against the others.

Which pixels are ignored is decided where they are counted (`confusion_matrix`). Values are fp64; NaN where there is
nothing to measure at all. Matrices are (k, k), or (n, k, k) with one an image.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from volvelle.export import export

Average = Literal["dataset", "image", "pair"]
Absent = Literal["skip", "zero", "one"]


@export("functional.class_iou")
def class_iou(matrix: Tensor) -> Tensor:
    """Return IoU_i (…, k) of matrices (…, k, k); NaN for a class that is neither in the target nor predicted.

    Long et al. 2015, section 5.

    >>> class_iou(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    tensor([0.7500, 0.8000,    nan], dtype=torch.float64)
    """
    _check("class_iou", matrix)
    hits = matrix.diagonal(dim1=-2, dim2=-1)
    return _ratio(hits, matrix.sum(-1) + matrix.sum(-2) - hits)


@export("functional.class_accuracy")
def class_accuracy(matrix: Tensor) -> Tensor:
    """Return n_ii / t_i (…, k), each class's recall, of matrices (…, k, k); NaN for a class the target has nowhere.

    Long et al. 2015, section 5.

    >>> class_accuracy(torch.tensor([[3, 1], [0, 4]]))
    tensor([0.7500, 1.0000], dtype=torch.float64)
    """
    _check("class_accuracy", matrix)
    return _ratio(matrix.diagonal(dim1=-2, dim2=-1), matrix.sum(-1))


@export("functional.pixel_accuracy", stable=True)
def pixel_accuracy(matrix: Tensor, *, average: Literal["dataset", "image"] = "dataset") -> Tensor:
    """Return PA = Σ_i n_ii / Σ_i t_i, a number: the share of pixels that are right.

    "image" gives every image the same weight, however many of its pixels are ignored; images without a pixel are left
    out. Long et al. 2015, section 5.

    >>> pixel_accuracy(torch.tensor([[3, 1], [0, 4]]))
    tensor(0.8750, dtype=torch.float64)
    """
    matrices = _matrices("pixel_accuracy", matrix, average, ("dataset", "image"))
    return _ratio(matrices.diagonal(dim1=-2, dim2=-1).sum(-1), matrices.sum((-2, -1))).nanmean()


@export("functional.mean_pixel_accuracy", stable=True)
def mean_pixel_accuracy(
    matrix: Tensor, *, average: Average = "dataset", absent: Absent = "skip", without: Collection[int] = ()
) -> Tensor:
    """Return MPA, the mean over classes of the share of each class's pixels that are right, a number.

    A class is absent when the target has it nowhere. The arguments are described at the head of this file. Long et al.
    2015, section 5 ("mean accuracy").

    >>> mean_pixel_accuracy(torch.tensor([[3, 1], [0, 4]]))
    tensor(0.8750, dtype=torch.float64)
    """
    matrices = _matrices("mean_pixel_accuracy", matrix, average)
    return mean_over_classes(class_accuracy(matrices), average=average, absent=absent, without=without)


@export("functional.mean_iou", stable=True)
def mean_iou(
    matrix: Tensor, *, average: Average = "dataset", absent: Absent = "skip", without: Collection[int] = ()
) -> Tensor:
    """Return MIoU, the mean over classes of IoU_i, a number.

    A class is absent when it is neither in the target nor predicted; one that is only predicted has IoU 0 and counts.
    torchmetrics' JaccardIndex(average="macro") is the default here, its segmentation.MeanIoU is average="pair".
    The arguments are described at the head of this file. Long et al. 2015, section 5.

    >>> images = torch.tensor([[[3, 1], [0, 4]], [[8, 0], [0, 0]]])
    >>> [round(float(mean_iou(images, average=average)), 4) for average in ("dataset", "image", "pair")]
    [0.8583, 0.8875, 0.85]
    """
    matrices = _matrices("mean_iou", matrix, average)
    return mean_over_classes(class_iou(matrices), average=average, absent=absent, without=without)


@export("functional.frequency_weighted_iou", stable=True)
def frequency_weighted_iou(matrix: Tensor, *, average: Literal["dataset", "image"] = "dataset") -> Tensor:
    """Return FWIoU = Σ_i t_i IoU_i / Σ_i t_i, a number: classes weigh as much as they have pixels.

    A class that the target has nowhere has no weight, so there is no question of absent classes. Long et al. 2015,
    section 5 ("frequency weighted IU").

    >>> frequency_weighted_iou(torch.tensor([[3, 1], [0, 4]]))
    tensor(0.7750, dtype=torch.float64)
    """
    matrices = _matrices("frequency_weighted_iou", matrix, average, ("dataset", "image"))
    frequency = matrices.sum(-1)
    return _ratio((frequency * class_iou(matrices).nan_to_num()).sum(-1), frequency.sum(-1)).nanmean()


def mean_over_classes(
    values: Tensor, *, average: Average = "dataset", absent: Absent = "skip", without: Collection[int] = ()
) -> Tensor:
    """The mean of values (n, k), NaN where a class is absent; n is 1 for average="dataset"."""
    if absent not in ("skip", "zero", "one"):
        raise ValueError(f"mean_over_classes: absent must be skip, zero or one, got {absent!r}")
    k = values.shape[-1]
    if any(not 0 <= c < k for c in without):
        raise ValueError(f"mean_over_classes: without must name classes 0 … {k - 1}, got {sorted(without)}")
    values = values[:, [c for c in range(k) if c not in without]]
    if absent != "skip":
        values = values.nan_to_num(nan=float(absent == "one"))
    return values.nanmean() if average == "pair" else values.nanmean(-1).nanmean()


def _matrices(call: str, matrix: Tensor, average: str, known: Collection[str] = ("dataset", "image", "pair")) -> Tensor:
    """(n, k, k): one matrix an image, or their sum as the only one."""
    if average not in known:
        raise ValueError(f"{call}: average must be one of {', '.join(known)}, got {average!r}")
    _check(call, matrix)
    if matrix.ndim == 2:
        if average != "dataset":
            raise ValueError(f"{call}: average={average!r} needs a matrix an image, (n, k, k), got {_shape(matrix)}")
        return matrix[None]
    if matrix.ndim != 3:
        raise ValueError(f"{call}: matrix must be (k, k), or (n, k, k) with one an image, got {_shape(matrix)}")
    return matrix.sum(0, keepdim=True) if average == "dataset" else matrix


def _check(call: str, matrix: Tensor) -> None:
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"{call}: matrix must be square, (…, k, k), got {_shape(matrix)}")


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """The quotient in fp64; NaN where the whole is 0."""
    return torch.where(whole == 0, torch.nan, part.double() / whole.double())


def _shape(matrix: Tensor) -> tuple[int, ...]:
    return tuple(matrix.shape)
