"""Average precision: the area under the curve of precision over recall, as VOC and COCO draw it.

Detections are taken from the surest down; each is a hit (a true positive) or a false alarm. After i of them

    p_i = hits_i / i        r_i = hits_i / positives        p(r) = max { p_j : r_j >= r }

p(r) is the precision made monotone. VOC 2007 averages p at the 11 recalls 0, 0.1, …, 1, VOC 2010 and later take the
area under p(r), COCO averages p at 101 recalls. A detection that is neither (it found a crowd, or a difficult object)
is ignored: it counts on neither side.

Everingham et al. 2010, "The Pascal Visual Object Classes (VOC) Challenge", section 4.2; Lin et al. 2014, "Microsoft
COCO: Common Objects in Context". Which detection is a hit is `box_matching`'s business, whole data sets are
`MeanAveragePrecision`'s.

Shapes: scores (n,), hits and ignored (…, n), positives a number or (…). Everything is computed in fp64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from volvelle.export import export

Interpolation = Literal["area", "11-point", "101-point"]


@export("functional.precision_recall")
def precision_recall(
    scores: Tensor, hits: Tensor, positives: int | Tensor, *, ignored: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return precision and recall (…, n) fp64 after the surest 1, 2, …, n detections.

    Equal scores keep their order. Before the first detection that is not ignored precision is 0; recall is NaN where
    there are no positives.

    Raises ValueError for shapes that do not fit and for NaN among the scores. Everingham et al. 2010, section 4.2.

    >>> precision_recall(torch.tensor([0.3, 0.9, 0.5]), torch.tensor([True, True, False]), 4)[1]
    tensor([0.2500, 0.2500, 0.5000], dtype=torch.float64)
    """
    _check("precision_recall", scores, hits, ignored)
    return _curve(scores, hits, positives, ignored)


def _curve(scores: Tensor, hits: Tensor, positives: int | Tensor, ignored: Tensor | None) -> tuple[Tensor, Tensor]:
    order = scores.argsort(descending=True, stable=True)
    counted = torch.ones_like(hits) if ignored is None else ~ignored.expand_as(hits)
    right = (hits & counted)[..., order].cumsum(-1).double()
    seen = counted[..., order].cumsum(-1).double()
    total = torch.as_tensor(positives, dtype=torch.float64, device=hits.device)[..., None]
    return right / seen.clamp(min=1), torch.where(total > 0, right / total.clamp(min=1), torch.nan)


@export("functional.average_precision", stable=True)
def average_precision(
    scores: Tensor,
    hits: Tensor,
    positives: int | Tensor,
    *,
    ignored: Tensor | None = None,
    interpolation: Interpolation = "area",
) -> Tensor:
    """Return the average precision (…) fp64 of detections with `scores` of which `hits` found one of the `positives`.

    `interpolation` is "area" (VOC since 2010), "11-point" (VOC 2007) or "101-point" (COCO). NaN where there are no
    positives, 0 where there are some and no detections.

    Raises ValueError for shapes that do not fit, NaN among the scores, and another interpolation.

    Everingham et al. 2010, section 4.2.

    >>> hits = torch.tensor([True, False, True, False])
    >>> [round(float(average_precision(torch.tensor([0.9, 0.8, 0.7, 0.6]), hits, 2, interpolation=how)), 4)
    ...  for how in ("area", "11-point", "101-point")]
    [0.8333, 0.8485, 0.835]
    """
    _check("average_precision", scores, hits, ignored)
    precision, recall = _curve(scores, hits, positives, ignored)
    if interpolation == "area":
        steps = recall.diff(dim=-1, prepend=torch.zeros_like(recall[..., :1]))
        found = (steps * monotone(precision)).sum(-1)
    elif interpolation in ("11-point", "101-point"):
        levels = recall_levels(11 if interpolation == "11-point" else 101, recall.device)
        found = precision_at(precision, recall, levels).mean(-1)
    else:
        raise ValueError(f"average_precision: interpolation must be area, 11-point or 101-point, got {interpolation!r}")
    total = torch.as_tensor(positives, device=found.device)
    return torch.where(total > 0, found, torch.nan)


def monotone(precision: Tensor) -> Tensor:
    """p(r) at every detection: the largest precision from there on."""
    return precision.flip(-1).cummax(-1).values.flip(-1)


def precision_at(precision: Tensor, recall: Tensor, levels: Tensor) -> Tensor:
    """p(r) (…, levels) at these recalls; 0 where the recall is not reached."""
    padded = torch.cat([monotone(precision), torch.zeros_like(precision[..., :1])], -1) if precision.shape[-1] else None
    if padded is None:
        return precision.new_zeros(*precision.shape[:-1], len(levels))
    # NaN recalls (no positives) must not be searched: they are in no order.
    first = torch.searchsorted(recall.nan_to_num(0.0).contiguous(), levels.expand(*recall.shape[:-1], -1).contiguous())
    return padded.gather(-1, first)


def recall_levels(count: int, device: torch.device | None = None) -> Tensor:
    """`count` recalls from 0 to 1: 11 are i / 10, so that 3 hits of 10 reach 0.3; others i · step, as COCO has them.

    >>> recall_levels(11)[3] <= torch.tensor(3, dtype=torch.float64) / 10
    tensor(True)
    """
    numbers = torch.arange(count, dtype=torch.float64, device=device)
    # pycocotools' recalls come from numpy's linspace, which multiplies: 0.29 and its like differ in the last bit.
    levels = numbers / 10 if count == 11 else numbers * (1 / (count - 1))
    levels[-1] = 1.0
    return levels


def _check(call: str, scores: Tensor, hits: Tensor, ignored: Tensor | None) -> None:
    if scores.ndim != 1 or hits.ndim < 1 or hits.shape[-1] != len(scores):
        raise ValueError(
            f"{call}: scores must be (n,) and hits (…, n), got {tuple(scores.shape)} and {tuple(hits.shape)}"
        )
    for name, flags in (("hits", hits), ("ignored", ignored)):
        if flags is not None and flags.dtype != torch.bool:
            raise TypeError(f"{call}: {name} must be bool, got {flags.dtype}")
    if ignored is not None and ignored.shape[-1:] != hits.shape[-1:]:
        raise ValueError(f"{call}: ignored must be (…, {len(scores)}), got {tuple(ignored.shape)}")
    if scores.isnan().any():
        raise ValueError(f"{call}: {int(scores.isnan().sum())} of {len(scores)} scores are NaN")
