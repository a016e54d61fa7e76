"""Mean average precision of a detector on a data set: COCO's twelve figures and VOC's, picture by picture.

COCO (Lin et al. 2014; pycocotools' COCOeval) averages over classes, 101 recalls and the thresholds of IoU 0.5, 0.55,
…, 0.95, with at most 100 detections a class and picture, and again for objects of up to 32², up to 96² and more pixels.
AR is the mean recall at 1, 10 and 100 detections. VOC has one threshold, 0.5, and no limit.

What is ignored (a crowd, a difficult object) is neither missed when it is not found nor a false alarm when it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.metrics.average_precision import Interpolation, average_precision, precision_at, recall_levels
from volvelle.parts.metrics.average_precision import precision_recall as curve_of
from volvelle.parts.metrics.box_matching import Picture, area, match_coco, match_voc, matched

RANGES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Areas in pixels between which objects count, both ends included."""


@export("nn.MeanAveragePrecision")
class MeanAveragePrecision(nn.Module):
    """Mean average precision that grows picture by picture, on one process or on many.

    `update(preds, target)` takes what torchmetrics' class of this name takes: a mapping a picture, with boxes (n, 4) as
    x1 y1 x2 y2 in pixels, scores (n,) and labels (n,) of the detections, boxes and labels of the objects, and perhaps
    iscrowd (m,) and area (m,) of these; iscrowd marks what is ignored, area is else that of the box. `compute()` gives
    COCO's figures under torchmetrics' names, `voc()` VOC's.

    A figure is -1 where no object is of its kind, as pycocotools prints it. A box without area overlaps nothing.

    Lin et al. 2014, "Microsoft COCO: Common Objects in Context".

    >>> there = {"boxes": torch.tensor([[0.0, 0, 50, 50]]), "labels": torch.tensor([3])}
    >>> found = {"boxes": torch.tensor([[0.0, 0, 50, 40]]), "labels": torch.tensor([3]), "scores": torch.tensor([0.9])}
    >>> figures = MeanAveragePrecision()
    >>> figures.update([found], [there])
    >>> {name: round(float(figures.compute()[name]), 2) for name in ("map", "map_50", "map_75", "map_small")}
    {'map': 0.7, 'map_50': 1.0, 'map_75': 1.0, 'map_small': -1.0}
    """

    def __init__(
        self,
        *,
        iou_thresholds: Sequence[float] | None = None,
        max_detection_thresholds: Sequence[int] = (1, 10, 100),
    ):
        super().__init__()
        given = torch.tensor(iou_thresholds, dtype=torch.float64) if iou_thresholds is not None else coco_thresholds()
        if not len(given) or not ((given > 0) & (given <= 1)).all():
            raise ValueError(f"MeanAveragePrecision: iou_thresholds must lie in (0, 1], got {iou_thresholds}")
        limits = tuple(max_detection_thresholds)
        if not limits or limits != tuple(sorted(set(limits))) or limits[0] < 1:
            raise ValueError(f"MeanAveragePrecision: max_detection_thresholds must rise from 1 or more, got {limits}")
        self.iou_thresholds, self.max_detection_thresholds = given, limits
        self._pictures: list[Picture] = []

    def __len__(self) -> int:
        """Pictures so far."""
        return len(self._pictures)

    @property
    def pictures(self) -> Sequence[Picture]:
        """What was taken in, picture by picture."""
        return tuple(self._pictures)

    @torch.no_grad()
    def update(self, preds: Sequence[Mapping[str, Tensor]], target: Sequence[Mapping[str, Tensor]]) -> None:
        """Take in pictures. Raises ValueError for shapes that do not fit and NaN among the scores."""
        if len(preds) != len(target):
            raise ValueError(
                f"MeanAveragePrecision.update: {len(preds)} pictures of detections and {len(target)} of objects"
            )
        # All of them before any is kept: a bad picture leaves nothing behind.
        self._pictures += [_picture(p, t) for p, t in zip(preds, target, strict=True)]

    def forward(self, preds: Sequence[Mapping[str, Tensor]], target: Sequence[Mapping[str, Tensor]]) -> None:
        """Take in pictures."""
        self.update(preds, target)

    def reset(self) -> None:
        """Forget everything."""
        self._pictures = []

    def over_ranks(self, group: dist.ProcessGroup | None = None) -> MeanAveragePrecision:
        """The figures of every rank's pictures together, the same on all of them; without torch.distributed, our own.

        All ranks of the group must call it. Figures depend on the order of pictures only where scores are equal; the
        order is rank by rank.
        """
        limits = self.max_detection_thresholds
        total = MeanAveragePrecision(iou_thresholds=self.iou_thresholds.tolist(), max_detection_thresholds=limits)
        gathered = [self._pictures]
        if dist.is_available() and dist.is_initialized():
            gathered = [list[Picture]() for _ in range(dist.get_world_size(group))]
            dist.all_gather_object(gathered, self._pictures, group=group)
        total._pictures = [picture for pictures in gathered for picture in pictures]
        return total

    @torch.no_grad()
    def compute(self) -> dict[str, Tensor]:
        """COCO's figures: map, map_50, map_75, map_small, map_medium, map_large, mar_1, mar_10, mar_100, mar_small, …

        Beside these numbers map_per_class, map_50_per_class and mar_100_per_class (k,), and `classes` (k,), the labels
        that they belong to. The number in mar_100 is the last of `max_detection_thresholds`.
        """
        precision, recall, classes = self.tables()
        last = self.max_detection_thresholds[-1]
        figures = {"map": _mean(precision[:, :, :, 0])}
        for name, value in (("map_50", 0.5), ("map_75", 0.75)):
            figures[name] = _mean(precision[self.iou_thresholds == value][:, :, :, 0])
        for number, name in enumerate(RANGES):
            if number:
                figures[f"map_{name}"] = _mean(precision[:, :, :, number])
        for number, limit in enumerate(self.max_detection_thresholds):
            figures[f"mar_{limit}"] = _mean(recall[:, :, 0, number])
        for number, name in enumerate(RANGES):
            if number:
                figures[f"mar_{name}"] = _mean(recall[:, :, number, -1])
        figures["map_per_class"] = _each(precision[:, :, :, 0])
        figures["map_50_per_class"] = _each(precision[self.iou_thresholds == 0.5][:, :, :, 0])
        figures[f"mar_{last}_per_class"] = _each(recall[:, None, :, 0, -1])
        return figures | {"classes": classes}

    @torch.no_grad()
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """COCOeval's tables: precision (t, 101, k, a) and recall (t, k, a, m), -1 without objects, and the labels (k,).

        t thresholds, k classes, a ranges of area (all, small, medium, large), m limits of detections.
        """
        ranges = torch.tensor(list(RANGES.values()), dtype=torch.float64)
        thresholds, limits, levels = self.iou_thresholds, self.max_detection_thresholds, recall_levels(101)
        classes = self.classes()
        t, k, a = len(thresholds), len(classes), len(ranges)
        precision = torch.full((t, len(levels), k, a), -1.0, dtype=torch.float64)
        recall = torch.full((t, k, a, len(limits)), -1.0, dtype=torch.float64)
        rule = partial(match_coco, thresholds=thresholds, ranges=ranges)
        found = matched(self._pictures, classes, rule, shape=(a, t), limit=limits[-1])
        positives = self._positives(classes, ranges)
        for number in range(k):
            chosen = found.labels == number
            scores, ranks = found.scores[chosen], found.ranks[chosen]
            hits, aside = found.hits[..., chosen], found.ignored[..., chosen]
            total = positives[number][:, None].expand(a, t)
            curve = precision_at(*curve_of(scores, hits, total, ignored=aside), levels)
            there = positives[number] > 0
            precision[:, :, number, there] = curve[there].permute(1, 2, 0)
            for m, limit in enumerate(limits):
                right = (hits & ~aside & (ranks < limit)).sum(-1).double() / total
                recall[:, number, there, m] = right[there].T
        return precision, recall, classes

    @torch.no_grad()
    def voc(self, iou_threshold: float = 0.5, *, interpolation: Interpolation = "area") -> dict[str, Tensor]:
        """VOC's figures: `map`, `map_per_class` (k,) and `classes` (k,); "11-point" is VOC 2007's rule.

        Every detection counts, and what is ignored is a difficult object. VOC's own code counts the last pixel of a box
        as inside: add 1 to x2 and y2 of both for its figures to the last digit.
        """
        classes = self.classes()
        found = matched(self._pictures, classes, lambda cells: match_voc(cells, iou_threshold))
        positives = self._positives(classes, torch.tensor([RANGES["all"]], dtype=torch.float64))[:, 0]
        each = torch.full((len(classes),), -1.0, dtype=torch.float64)
        for number in torch.nonzero(positives).flatten().tolist():
            chosen = found.labels == number
            flags = {"ignored": found.ignored[chosen], "interpolation": interpolation}
            each[number] = average_precision(found.scores[chosen], found.hits[chosen], positives[number], **flags)
        return {"map": _mean(each), "map_per_class": each, "classes": classes}

    def classes(self) -> Tensor:
        """The labels (k,) that occur, among objects or detections, in order."""
        labels = [x for picture in self._pictures for x in (picture.labels, picture.classes)]
        return torch.cat(labels).unique() if labels else torch.zeros(0, dtype=torch.int64)

    def _positives(self, classes: Tensor, ranges: Tensor) -> Tensor:
        """Objects (k, a) of each class and range that are not ignored."""
        counts = torch.zeros(len(classes), len(ranges), dtype=torch.int64)
        for picture in self._pictures:
            inside = (picture.areas[:, None] >= ranges[:, 0]) & (picture.areas[:, None] <= ranges[:, 1])
            rows = torch.searchsorted(classes, picture.classes)
            counts.index_add_(0, rows, (inside & ~picture.ignored[:, None]).long())
        return counts


def coco_thresholds() -> Tensor:
    """0.5, 0.55, …, 0.95 (10,) fp64, to the bit those of pycocotools, which come from numpy's linspace."""
    return 0.5 + torch.arange(10, dtype=torch.float64) * ((0.95 - 0.5) / 9)


def _mean(values: Tensor) -> Tensor:
    """The mean of what is not -1, else -1."""
    there = values > -1
    return values[there].mean() if there.any() else torch.tensor(-1.0, dtype=torch.float64)


def _each(values: Tensor) -> Tensor:
    """The mean (k,) over thresholds and recalls of values (t, r, k); -1 for a class without objects."""
    return values.mean((0, 1)) if values.shape[0] else values.new_full(values.shape[2:], -1.0)


def _picture(pred: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Picture:
    """The tensors of one picture, checked, on the CPU."""
    for name, values, wanted in (
        ("preds", pred, ("boxes", "scores", "labels")),
        ("target", target, ("boxes", "labels")),
    ):
        missing = [key for key in wanted if key not in values]
        if missing:
            raise ValueError(f"MeanAveragePrecision.update: a picture of {name} lacks {', '.join(missing)}")
    objects = target["boxes"].detach().cpu().double().reshape(-1, 4)
    crowd, areas = target.get("iscrowd"), target.get("area")
    picture = Picture(
        pred["boxes"].detach().cpu().double().reshape(-1, 4),
        pred["scores"].detach().cpu().double(),
        pred["labels"].detach().cpu().long(),
        objects,
        target["labels"].detach().cpu().long(),
        torch.zeros(len(objects), dtype=torch.bool) if crowd is None else crowd.detach().cpu().bool(),
        area(objects) if areas is None else areas.detach().cpu().double(),
    )
    for first, others in ((0, (1, 2)), (3, (4, 5, 6))):
        for other in others:
            if picture[other].shape != (len(picture[first]),):
                raise ValueError(
                    f"MeanAveragePrecision.update: {len(picture[first])} boxes, and {Picture._fields[other]} of shape "
                    f"{tuple(picture[other].shape)}"
                )
    if picture.scores.isnan().any():
        raise ValueError(f"MeanAveragePrecision.update: {int(picture.scores.isnan().sum())} scores are NaN")
    return picture
