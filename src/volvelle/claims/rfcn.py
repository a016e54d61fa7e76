"""R-FCN: scores that depend on where a box lies, from maps shared by all regions, so that one more costs nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor, nn

    from volvelle.claims.detect_scenes import Part
    from volvelle.systems.backbone.model import Backbone
    from volvelle.systems.detection.model import Detector

CLAIM = Claim(
    title="R-FCN: position-sensitive score maps",
    family="detection",
    paper=Paper(
        "Dai et al.",
        2016,
        "R-FCN: Object Detection via Region-based Fully Convolutional Networks",
        "sections 2 and 4.1",
        "https://arxiv.org/abs/1605.06409",
    ),
    sentence="position-sensitive score maps address a dilemma between translation-invariance in image classification "
    "and translation-variance in object detection; almost all computation is shared on the entire image",
    measured_by="R-FCNs with k = 1, 3 and 7 on one frozen ImageNet encoder, trained on scenes: the score of an "
    "object's class for its box moved by half its size, over that for the box itself, and mAP50 (quick: one seed); "
    "products and seconds of the head for 2000 regions over those for 100, beside a head of two linear layers",
    summary="A map for each part of an object: a region's score is the mean of its parts' votes. Regions share all of "
    "the convolutions and have no weights of their own.",
    summary_zh="每个相对位置一张得分图：区域得分是各部位投票的平均，卷积全图共享，各区域没有自己的权重。",
    seconds={"quick": 60, "full": 900},
    parts=("functional.ps_roi_align", "functional.ps_roi_pool"),
    recipe="volvelle train detect data=FOLDER",
)

KERNELS = (1, 3, 7)
SHIFTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""By how much of its size a box is moved."""
REGIONS = (100, 2000)


def measure(budget: Budget) -> Measurement:
    """Position sensitivity, accuracy, and what a region costs."""
    from volvelle.claims.garments import two_threads
    from volvelle.errors import VolvelleError

    seeds, steps, pictures = (1, 80, 128) if budget == "quick" else (3, 500, 600)
    notes: list[str] = []
    pictures_drawn: dict[str, str] = {}
    with two_threads():
        findings = _cost(quick=budget == "quick")
        try:
            seen, drawn = _sensitivity(seeds, steps, pictures)
            findings, pictures_drawn = seen + findings, {"shift": drawn}
        except VolvelleError as error:
            notes.append(f"position sensitivity was not measured: {error}")
    setting = {
        "scenes": pictures, "pixels": 128, "encoder": "efficientnet-lite0 at stride 16, frozen", "steps": steps,
        "seeds": seeds, "dtype": "fp32",
    }  # fmt: skip
    return Measurement(findings, setting=setting, notes=notes, pictures=pictures_drawn)


def _sensitivity(seeds: int, steps: int, pictures: int) -> tuple[list[Finding], str]:
    from volvelle.claims.detect_scenes import map50, scenes, train
    from volvelle.systems.backbone.load import backbone

    encoder = backbone("efficientnet-lite0", weights="imagenet", output_stride=16)
    parts = [scenes(encoder, count, part) for count, part in ((pictures, "train"), (max(32, pictures // 4), "val"))]
    curves: dict[int, list[list[float]]] = {}
    accuracy: dict[int, list[float]] = {}
    for k in KERNELS:
        for seed in range(seeds):
            model = _variant(k, encoder, seed)
            train(model, parts[0], steps, seed)
            curves.setdefault(k, []).append(scores_of_shifted(model, parts[1], SHIFTS))
            accuracy.setdefault(k, []).append(map50(model, parts[1]))
    left = {k: [curve[-1] / max(curve[0], 1e-9) for curve in some] for k, some in curves.items()}
    mean = {k: statistics.mean(values) for k, values in left.items()}
    found = {k: statistics.mean(values) for k, values in accuracy.items()}
    findings = [
        at_most(f"score left at a shift of half a box, k = {k} minus k = 1", mean[k] - mean[1], 0.0)
        for k in KERNELS[1:]
    ]
    findings += [at_least(f"mAP50, k = {k} minus k = 1", found[k] - found[1], 0.0, "points") for k in KERNELS[1:]]
    for k in KERNELS:
        spread = (min(left[k]), max(left[k]))
        findings.append(Finding(f"k = {k}: score left at a shift of half a box", mean[k], spread=spread))
        spread = (min(accuracy[k]), max(accuracy[k]))
        findings.append(Finding(f"k = {k}: mAP50 after {steps} steps", found[k], "%", spread=spread))
    return findings, _chart(curves)


def _variant(k: int, encoder: Backbone, seed: int) -> Detector:
    """R-FCN with k² maps a class behind a frozen encoder."""
    import copy

    import torch

    from volvelle.claims.detect_scenes import ANCHORS, SIZE
    from volvelle.systems.detection import config as c
    from volvelle.systems.detection.compositions import compose

    torch.manual_seed(seed)
    numbers = c.RPN(anchors=ANCHORS, before=300, training=100, testing=60)
    classes = tuple(f"garment {i}" for i in range(10))
    composition = c.RFCN(bins=k, width=128, proposer=128)
    config = c.DetectorConfig(encoder.config.name, composition, classes, rpn=numbers, sampling=c.Hardest(64), size=SIZE)
    return compose(config, copy.deepcopy(encoder))


def scores_of_shifted(model: Detector, part: Part, shifts: Sequence[float]) -> list[float]:
    """The mean score of the objects' own classes for boxes moved by each share of their size, four ways."""
    import torch

    from volvelle.claims.detect_scenes import SIZE

    maps, sizes, targets = part.rows(slice(None))
    ways = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    with torch.no_grad():
        features = model.look(maps, sizes, (SIZE, SIZE)).features
        extent = (targets.boxes[..., 2:] - targets.boxes[..., :2]).unsqueeze(2)
        found = []
        for shift in shifts:
            moved = (shift * extent * ways).repeat(1, 1, 1, 2)  # (b, m, 4 ways, 4)
            boxes = (targets.boxes.unsqueeze(2) + moved).flatten(1, 2)
            scores = model.roi_head(features, boxes).logits.softmax(-1)
            own = scores.gather(2, targets.labels.repeat_interleave(len(ways), 1).unsqueeze(-1))[..., 0]
            found.append(float(own[targets.mask.repeat_interleave(len(ways), 1)].mean()))
    return found


def heads() -> dict[str, nn.Module]:
    """What stands behind ResNet's last map in R-FCN and in Faster R-CNN, for 20 classes, on maps (b, 2048, y, x)."""
    from torch import nn

    from volvelle.systems.detection.heads import FullyConnected, PositionSensitive
    from volvelle.systems.detection.necks import TwoStages
    from volvelle.systems.detection.pools import Align, PositionSensitiveAlign

    class Behind(nn.Module):
        def __init__(self, width: int, scorer: nn.Module):
            super().__init__()
            self.neck, self.scorer = TwoStages(2048, width), scorer

        def forward(self, last: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
            return self.scorer(self.neck.reduce(last), regions)

    return {
        "R-FCN": Behind(1024, PositionSensitive(PositionSensitiveAlign(7, 16), 1024, 7, 20)),
        "Faster R-CNN": Behind(256, FullyConnected(Align(7, 16), 256, 256 * 49, (1024, 1024), 20)),
    }


def work_of(head: nn.Module, size: tuple[int, int], count: int) -> Any:
    """A call of the head on a random map of a picture of that size, with so many random regions."""
    import torch

    draw = torch.Generator().manual_seed(0)
    last = torch.randn(1, 2048, -(-size[0] // 16), -(-size[1] // 16), generator=draw)
    corner = torch.rand(count, 2, generator=draw) * 0.6
    corners = torch.cat((corner, corner + 0.05 + 0.35 * torch.rand(count, 2, generator=draw)), 1)
    regions = torch.cat((torch.zeros(count, 1), corners * torch.tensor([size[1], size[0]] * 2)), 1)
    return lambda: head(last, regions)


def products_of(head: nn.Module, size: tuple[int, int], count: int) -> int:
    """Multiply-accumulates of the head's convolutions and linear layers for so many regions."""
    from volvelle.claims.detect_scenes import counted

    return counted(head, work_of(head, size, count))


def _cost(*, quick: bool) -> list[Finding]:
    """Products and seconds for many regions over those for few."""
    import torch

    size, rounds = ((300, 500), 3) if quick else ((600, 1000), 7)
    findings, seconds = [], {}
    made = heads()
    for who, head in made.items():
        few, many = (products_of(head, size, count) for count in REGIONS)
        each = (many - few) / (REGIONS[1] - REGIONS[0])
        findings.append(Finding(f"{who}: products of the head for one more region", each / 1e6, "M"))
    work = {(who, count): work_of(head, size, count) for who, head in made.items() for count in REGIONS}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for key, call in work.items():
                start = time.perf_counter()
                call()
                seconds.setdefault(key, []).append(time.perf_counter() - start)
    for who in made:
        ratios = [b / a for a, b in zip(seconds[who, REGIONS[0]][1:], seconds[who, REGIONS[1]][1:], strict=True)]
        what = f"{who}: seconds of the head at {REGIONS[1]} regions over those at {REGIONS[0]}"
        value, spread = statistics.median(ratios), (min(ratios), max(ratios))
        judged = at_most(what, value, 1.3, "x", spread=spread)
        findings.append(judged if who == "R-FCN" else Finding(what, value, "x", spread=spread))
    return findings


def _chart(curves: dict[int, list[list[float]]]) -> str:
    from volvelle.train.charts import Series, line_chart, standalone

    lines = [
        Series(
            f"k = {k}",
            [(s, statistics.mean(v)) for s, v in zip(SHIFTS, zip(*some, strict=True), strict=True)],
            dots=True,
        )
        for k, some in curves.items()
    ]
    return standalone(line_chart(lines, x_label="shift, in sizes of the box", y_label="score of its class"))
