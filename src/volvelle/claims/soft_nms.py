"""Soft-NMS: scores that fall by overlap keep neighbours that hard suppression removes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least

if TYPE_CHECKING:
    from torch import Generator, Tensor

CLAIM = Claim(
    title="Soft-NMS: suppression by degrees",
    family="detection",
    paper=Paper(
        "Bodla et al.",
        2017,
        "Soft-NMS: Improving Object Detection With One Line of Code",
        "abstract, section 3 and table 3",
        "https://arxiv.org/abs/1704.04503",
    ),
    sentence="Soft-NMS decays the detection scores of all other objects as a continuous function of their overlap with "
    "M; it obtains consistent improvements for the coco-style mAP (1.3 % for R-FCN and 1.1 % for Faster-RCNN on "
    "MS-COCO) by just changing the NMS algorithm without any additional hyper-parameters",
    measured_by="drawn crowds whose boxes overlap and rows of boxes that do not, with the detections that a detector "
    "would make (several a box, scores that follow their overlap with it, false alarms): COCO's AP after hard NMS at "
    "the paper's 0.3 and after both forms of Soft-NMS, and after hard NMS at its best threshold",
    summary="Lowers the scores of boxes that overlap a better one and removes none: neighbours in a crowd stay.",
    summary_zh="不删除与更优框重叠的框，只按重叠程度降低其得分：密集人群中的相邻目标得以保留。",
    seconds={"quick": 40, "full": 300},
    parts=("functional.soft_nms", "functional.nms"),
)

OBJECTS, EACH, ALARMS = 8, 12, 20
"""Objects a picture, detections an object, false alarms a picture."""
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
PUBLISHED = 0.011
"""The least gain in AP that the paper reports on COCO."""
WAYS = {0.3: "NMS at 0.3", "gaussian": "Soft-NMS, gaussian", "linear": "Soft-NMS, linear"}


def measure(budget: Budget) -> Measurement:
    """40 pictures of each kind (full: 300)."""
    count = 40 if budget == "quick" else 300
    findings = list[Finding]()
    gains = dict[str, float]()
    for kind in ("crowded", "apart"):
        found = precisions(kind, count)
        best = max(THRESHOLDS, key=lambda threshold: found[threshold])
        gains[kind] = found["gaussian"] - found[0.3]
        findings += [Finding(f"{kind}: AP after {name}", found[way]) for way, name in WAYS.items()]
        findings.append(Finding(f"{kind}: AP after NMS at its best threshold, {best:g}", found[best]))
    findings += [
        at_least("crowded: AP of Soft-NMS, gaussian, less NMS at 0.3", gains["crowded"], PUBLISHED),
        at_least("apart: the same", gains["apart"], -0.005),
    ]
    setting = {"pictures of each kind": count, "objects": OBJECTS, "detections an object": EACH, "sigma": 0.5,
               "false alarms": ALARMS, "seed": 0}  # fmt: skip
    notes = ["detections are drawn, not a network's: how much is gained depends on how many objects overlap"]
    return Measurement(findings, setting=setting, notes=notes)


def precisions(kind: str, count: int) -> dict[float | str, float]:
    """AP over COCO's thresholds after each way to suppress, over the same pictures."""
    import torch

    from volvelle.parts.metrics.mean_average_precision import MeanAveragePrecision
    from volvelle.parts.regions import nms, soft_nms

    draw = torch.Generator().manual_seed(0)
    figures: dict[float | str, MeanAveragePrecision] = {
        way: MeanAveragePrecision() for way in (*THRESHOLDS, "gaussian", "linear")
    }
    for _ in range(count):
        objects = crowd(draw) if kind == "crowded" else row(draw)
        boxes, scores = detections(objects, draw)
        truth = {"boxes": objects, "labels": torch.zeros(len(objects), dtype=torch.long)}
        for way, figure in figures.items():
            if isinstance(way, str):
                kept, left = soft_nms.soft_nms(boxes, scores, method="linear" if way == "linear" else "gaussian")
            else:
                kept = nms.nms(boxes, scores, way)
                left = scores[kept]
            found = {"boxes": boxes[kept], "scores": left, "labels": torch.zeros(len(kept), dtype=torch.long)}
            figure.update([found], [truth])
    return {way: float(figure.compute()["map"]) for way, figure in figures.items()}


def crowd(draw: Generator) -> Tensor:
    """Objects (k, 4) in pairs that lie side by side, moved by a third to two thirds of their width."""
    import torch

    sizes = 50 + 70 * torch.rand(OBJECTS // 2, 2, generator=draw)
    corners = 500 * torch.rand(OBJECTS // 2, 2, generator=draw)
    first = torch.cat((corners, corners + sizes), 1)
    away = torch.zeros_like(first)
    away[:, ::2] = ((1 + torch.rand(len(first), 1, generator=draw)) / 3) * sizes[:, :1]
    return torch.cat((first, first + away))


def row(draw: Generator) -> Tensor:
    """Objects (k, 4) of which none touches another."""
    import torch

    sizes = 50 + 70 * torch.rand(OBJECTS, 2, generator=draw)
    corners = torch.stack((150.0 * torch.arange(OBJECTS), 400 * torch.rand(OBJECTS, generator=draw)), 1)
    return torch.cat((corners, corners + sizes), 1)


def detections(objects: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
    """Boxes (n, 4) near the objects with scores that follow their overlap, and some where nothing is."""
    import torch

    from volvelle.parts.regions.iou import box_iou

    near = objects.repeat_interleave(EACH, 0)
    sides = (near[:, 2:] - near[:, :2]).repeat(1, 2)
    near = near + 0.08 * sides * torch.randn(near.shape, generator=draw)
    own = box_iou(near, objects)[torch.arange(len(near)), torch.arange(len(objects)).repeat_interleave(EACH)]
    corners = 500 * torch.rand(ALARMS, 2, generator=draw)
    alarms = torch.cat((corners, corners + 50 + 70 * torch.rand(ALARMS, 2, generator=draw)), 1)
    noise = 0.1 * torch.randn(len(near), generator=draw)
    scores = torch.cat(((own + noise).clamp(0.02, 0.99), 0.3 * torch.rand(ALARMS, generator=draw)))
    return torch.cat((near, alarms)), scores
