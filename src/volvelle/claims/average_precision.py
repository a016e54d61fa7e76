"""Mean average precision: equal to the official rules to the last digits, and where its variants mislead."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

CLAIM = Claim(
    title="Mean average precision of detectors",
    family="metrics",
    paper=Paper(
        "Everingham & Winn",
        2010,
        "The PASCAL Visual Object Classes Challenge 2010 Development Kit",
        "section 3.4.1; the 11-point rule: Everingham et al. 2010, section 4.2; COCO's: Lin et al. 2014",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/",
    ),
    sentence="The computation of the average precision (AP) measure was changed in 2010 to improve precision and "
    "ability to measure differences between methods with low AP",
    measured_by="random data sets with crowds, copies and false alarms: both of VOC's rules against a loop over "
    "detections as the kit describes it, COCO's twelve figures against pycocotools; changes of a ranking that may not "
    "lower AP; detectors that find few of many objects, under the rule before and after 2010; boxes of a known IoU "
    "under COCO's mean over thresholds; false alarms added behind the last hit",
    summary="The area under precision over recall, as VOC 2007, VOC 2010 and COCO compute it, which differ.",
    summary_zh="检测的平均精度（AP）：VOC 2007 的 11 点、VOC 2010 的曲线下面积与 COCO 的多阈值平均各不相同。",
    seconds={"quick": 60, "full": 300},
    parts=("functional.average_precision", "functional.precision_recall", "nn.MeanAveragePrecision"),
    recipe="volvelle train detect data=FOLDER",
)

SAME = 1e-9
"""The largest difference from the official rules that counts as none."""
MANY = 1000
"""Objects, of which a weak detector finds few."""
Picture = tuple[dict[str, "Tensor"], dict[str, "Tensor"]]


def measure(budget: Budget) -> Measurement:
    """Random data sets (quick: 3 of 15 pictures, full: 30 of 50), random rankings, and constructed ones."""
    sets, pictures, rankings = (3, 15, 100) if budget == "quick" else (30, 50, 2000)
    peer, versions = _coco(sets, pictures)
    findings = [*_voc(sets, pictures), *peer, *_monotone(rankings), *_low(), *_thresholds(), *_behind()]
    notes = [
        "AP looks at the order of detections alone: whoever uses a detector needs a threshold, which it does not rate"
    ]
    if not versions:
        notes.append("pycocotools is not installed here: COCO's figures were not compared")
    setting = {"data sets": sets, "pictures each": pictures, "classes": CLASSES, "rankings": rankings, "dtype": "fp64"}
    peers = {"loops after the kit": "section 3.4.1", **versions}
    return Measurement(findings, peers=peers, setting=setting, notes=notes, pictures={"low": _picture()})


CLASSES = 3


def data_set(pictures: int, seed: int) -> list[Picture]:
    """Objects, some of them crowds; detections that are shaken objects, copies of them, and inventions."""
    import torch

    draw = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draw)

    def boxes(count: int) -> Tensor:
        corner = torch.rand(count, 2, generator=draw, dtype=torch.float64) * 150
        return torch.cat((corner, corner + 4 + torch.rand(count, 2, generator=draw, dtype=torch.float64) ** 2 * 120), 1)

    found = []
    for _ in range(pictures):
        there, wild = int(whole(0, 8, 1)), boxes(int(whole(0, 5, 1)))
        objects, labels = boxes(there), whole(0, CLASSES, there)
        which = whole(0, max(1, there), int(whole(0, 12, 1)) if there else 0)
        sides = (objects[which, 2:] - objects[which, :2]).repeat(1, 2)
        shaken = objects[which] + torch.randn(len(which), 4, generator=draw, dtype=torch.float64) * 0.07 * sides
        shaken[:, 2:] = torch.maximum(shaken[:, 2:], shaken[:, :2] + 1)
        seen = torch.cat((shaken, wild))
        names = torch.cat((labels[which], whole(0, CLASSES, len(wild))))
        scores = torch.rand(len(seen), generator=draw, dtype=torch.float64)
        crowd = torch.rand(there, generator=draw) < 0.15
        found.append(
            ({"boxes": seen, "scores": scores, "labels": names}, {"boxes": objects, "labels": labels, "iscrowd": crowd})
        )
    return found


def _figures(data: list[Picture], **options: Any) -> Any:
    from volvelle.parts.metrics.mean_average_precision import MeanAveragePrecision

    figures = MeanAveragePrecision(**options)
    figures.update(*map(list, zip(*data, strict=True)))
    return figures


def by_loops(data: list[Picture], label: int, *, eleven: bool, threshold: float = 0.5) -> float | None:
    """VOC's AP of one class, detection by detection, in whole numbers where the kit compares; None without objects."""
    surest = sorted(
        ((float(score), number, i) for number, (pred, _) in enumerate(data) for i, score in enumerate(pred["scores"])
         if pred["labels"][i] == label), key=lambda one: -one[0],
    )  # fmt: skip
    rights = [
        [(box, bool(crowd)) for box, name, crowd in _objects(target) if name == label] for _, target in data
    ]  # fmt: skip
    positives = sum(not difficult for objects in rights for _, difficult in objects)
    if not positives:
        return None
    taken, hits, seen, curve = set[tuple[int, int]](), 0, 0, list[tuple[int, float]]()
    for _, number, i in surest:
        box = data[number][0]["boxes"][i].tolist()
        best, which = max(((_iou(box, other), -k) for k, (other, _) in enumerate(rights[number])), default=(0.0, 0))
        near = best >= threshold
        if near and rights[number][-which][1]:
            continue
        hits += near and (number, -which) not in taken
        taken |= {(number, -which)} if near else set()
        seen += 1
        curve.append((hits, hits / seen))
    if eleven:
        return sum(max((p for h, p in curve if 10 * h >= t * positives), default=0.0) for t in range(11)) / 11
    return sum(max((p for h, p in curve if h >= k), default=0.0) for k in range(1, positives + 1)) / positives


def _objects(target: dict[str, Tensor]) -> Iterator[tuple[list[float], int, int]]:
    yield from zip(*(target[name].tolist() for name in ("boxes", "labels", "iscrowd")), strict=True)


def _iou(a: list[float], b: list[float]) -> float:
    inside = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return inside / (sum(areas) - inside)


def _voc(sets: int, pictures: int) -> list[Finding]:
    worst = {"11-point": 0.0, "area": 0.0}
    compared = 0
    for seed in range(sets):
        data = data_set(pictures, seed)
        for how in worst:
            ours = _figures(data).voc(interpolation=how)
            for label, value in zip(ours["classes"].tolist(), ours["map_per_class"].tolist(), strict=True):
                loop = by_loops(data, label, eleven=how == "11-point")
                worst[how] = max(worst[how], abs(value - (-1.0 if loop is None else loop)))
                compared += 1
    return [
        at_most("largest difference of VOC 2007's AP (11 points) from the loop", worst["11-point"], SAME),
        at_most("largest difference of VOC 2010's AP (area) from the loop", worst["area"], SAME),
        Finding("classes compared", compared),
    ]


def _coco(sets: int, pictures: int) -> tuple[list[Finding], dict[str, str]]:
    from importlib import metadata
    from importlib.util import find_spec

    if find_spec("pycocotools") is None:
        return [], {}
    worst = 0.0
    for seed in range(sets):
        data = data_set(pictures, 1000 + seed)
        ours = [float(value) for value in list(_figures(data).compute().values())[:12]]
        worst = max(worst, *(abs(a - b) for a, b in zip(ours, by_pycocotools(data), strict=True)))
    found = at_most("largest difference of COCO's twelve figures from pycocotools", worst, SAME)
    return [found], {"pycocotools": metadata.version("pycocotools")}


def by_pycocotools(data: list[Picture]) -> list[float]:
    """The twelve figures that COCOeval prints."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    notes, seen = list[dict[str, Any]](), list[dict[str, Any]]()
    for image, (pred, target) in enumerate(data, 1):
        for place, part, more in ((notes, target, "iscrowd"), (seen, pred, "scores")):
            for (x, y, right, low), label, extra in zip(
                part["boxes"].tolist(), part["labels"].tolist(), part[more].tolist(), strict=True
            ):
                one = {
                    "id": len(place) + 1,
                    "image_id": image,
                    "category_id": label,
                    "bbox": [x, y, right - x, low - y],
                }
                kind = {"iscrowd": int(extra)} if more == "iscrowd" else {"score": extra}
                place.append({**one, "area": (right - x) * (low - y), **kind})
    with contextlib.redirect_stdout(io.StringIO()):
        truth: Any = COCO()
        truth.dataset = {
            "info": {}, "images": [{"id": i + 1} for i in range(len(data))], "annotations": notes,
            "categories": [{"id": label} for label in range(CLASSES)],
        }  # fmt: skip
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(seen), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats.tolist()


def _ap(hits: Tensor, positives: int, how: Any = "area") -> float:
    """AP of a ranking, the surest first."""
    import torch

    from volvelle.parts.metrics.average_precision import average_precision

    scores = torch.arange(len(hits), 0, -1, dtype=torch.float64)
    return float(average_precision(scores, hits, positives, interpolation=how))


def _monotone(rankings: int) -> list[Finding]:
    """A hit in place of a false alarm, or before one, never lowers AP; nor does a lower threshold of IoU in VOC."""
    import torch

    draw, worse, higher = torch.Generator().manual_seed(0), 0, 0
    for number in range(rankings):
        hits = torch.rand(30, generator=draw) < 0.4
        hits[0], hits[-1] = False, True
        for how in ("area", "11-point", "101-point"):
            before = _ap(hits, 40, how)
            wrong = int((~hits).nonzero()[int(torch.randint(int((~hits).sum()), (1,), generator=draw))])
            found, swapped = hits.clone(), hits.clone()
            found[wrong] = True
            later = int(hits.nonzero()[-1])
            swapped[0], swapped[later] = True, False
            worse += (_ap(found, 40, how) < before - 1e-12) + (_ap(swapped, 40, how) < before - 1e-12)
        if number < rankings // 20:
            figures = _figures(data_set(10, 5000 + number))
            each = [float(figures.voc(t)["map"]) for t in (0.3, 0.5, 0.7, 0.9)]
            higher += each != sorted(each, reverse=True)
    return [
        at_most("rankings made better whose AP fell", worse, 0),
        at_most("data sets on which a stricter IoU gave VOC's AP a higher value", higher, 0),
    ]


def few(found: int, how: str) -> float:
    """AP of a detector that finds so many of `MANY` objects and says nothing false."""
    import torch

    return _ap(torch.ones(found, dtype=torch.bool), MANY, how)


def _low() -> list[Finding]:
    """The reason for the change of 2010."""
    old, new = (few(90, how) - few(1, how) for how in ("11-point", "area"))
    return [
        Finding(f"11-point AP of a detector that finds 1 of {MANY} objects", few(1, "11-point")),
        at_most(f"11-point AP: 90 of {MANY} found minus 1 of {MANY} found (blind to it)", abs(old), 1e-12),
        at_most("area: the same, from 89 / 1000", abs(new - 89 / MANY), 1e-12),
        Finding(f"101-point AP of 1 of {MANY}: COCO's rule keeps a tenth of the trap", few(1, "101-point")),
    ]


def _thresholds() -> list[Finding]:
    """Every object found by a box of a known IoU: COCO's AP counts the thresholds that the IoU reaches."""
    import torch

    worst, shown = 0.0, {}
    for percent in (48, 52, 63, 74, 88, 97):
        high = torch.tensor([[10.0, 10.0, 110.0, 110.0]], dtype=torch.float64)
        low = high.clone()
        low[0, 3] = 10 + percent  # inside the object: IoU is its share of the area
        target = {"boxes": high, "labels": torch.zeros(1).long(), "iscrowd": torch.zeros(1).bool()}
        pred = {"boxes": low, "labels": torch.zeros(1).long(), "scores": torch.ones(1).double()}
        found = _figures([(pred, target)]).compute()
        reached = sum(percent >= t for t in range(50, 100, 5)) / 10
        worst, shown[percent] = max(worst, abs(float(found["map"]) - reached)), float(found["map_50"])
    data = data_set(20, 77)
    figures = _figures(data)
    alone = [float(_figures(data, iou_thresholds=[float(t)]).compute()["map"]) for t in figures.iou_thresholds]
    mean = abs(float(figures.compute()["map"]) - sum(alone) / len(alone))
    return [
        at_most("boxes of a known IoU: COCO's AP apart from the share of thresholds reached", worst, 1e-12),
        at_most("COCO's AP apart from the mean of ten APs, one a threshold", mean, 1e-12),
        at_least("AP at 0.5 of boxes with an IoU of 0.52, which COCO's AP gives 0.1", shown[52], 1.0),
    ]


def _behind() -> list[Finding]:
    """False alarms that are less sure than the last hit."""
    import torch

    hits = torch.ones(50, dtype=torch.bool)
    crowded = torch.cat((hits, torch.zeros(950, dtype=torch.bool)))
    changed = abs(_ap(crowded, 100) - _ap(hits, 100))
    return [
        at_most("950 false alarms behind the last of 50 hits: change of AP", changed, 0.0),
        Finding("precision of what was found: with them", float(crowded.double().mean())),
        Finding("without", float(hits.double().mean())),
    ]


def _picture() -> str:
    from volvelle.train.charts import Series, line_chart, standalone

    lines = []
    for how, name in (
        ("11-point", "VOC 2007, 11 points"),
        ("101-point", "COCO, 101 points"),
        ("area", "VOC 2010, area"),
    ):
        lines.append(Series(name, [(float(n), few(n, how)) for n in range(1, 251, 3)]))
    return standalone(line_chart(lines, x_label=f"objects found, of {MANY}", y_label="average precision"))
