"""One confusion matrix against torchmetrics on the same masks: JaccardIndex and MeanIoU, with and without their checks.

    python -m benchmarks.metrics [--quick] [--only uint8 int64 wide] [--rounds 5] [--threads N]

Every variant counts a batch of masks and computes the mean IoU from nothing; the figures are compared first. Writes
results/metrics.json; --quick takes small masks and two rounds, and prints only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.segmentation import MeanIoU

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol, tables
from volvelle.functional import confusion_matrix, mean_iou


@dataclass(frozen=True)
class Case:
    """Masks of one kind: classes, numbers as they are stored."""

    title: str
    classes: int
    dtype: torch.dtype


CASES = {
    "uint8": Case("12 classes, uint8", 12, torch.uint8),
    "int64": Case("12 classes, int64", 12, torch.int64),
    "wide": Case("150 classes, uint8", 150, torch.uint8),
}
SHAPE, SMALL = (30, 360, 480), (3, 90, 120)


def main() -> None:
    options = protocol.parser(__doc__, CASES).parse_args()
    torch.set_num_threads(options.threads)
    rounds = options.rounds or (2 if options.quick else 5)
    with protocol.alone():
        facts = protocol.machine(("torch", "torchmetrics"))
        rows = protocol.read("metrics").get("rows", [])
        for name in options.only:
            rows = protocol.keep(rows, measure(name, CASES[name], rounds, quick=options.quick))
            if not options.quick:  # after every row: a run that is cut keeps what it measured
                record = {"shape": SHAPE, "machine": facts, "rows": rows}
                print(protocol.write("metrics", record))
                tables.write("metrics")


def measure(name: str, case: Case, rounds: int, *, quick: bool) -> dict[str, Any]:
    """Every variant once a round, each round several times over the masks."""
    preds, target = _masks(case, SMALL if quick else SHAPE)
    variants = _variants(case, preds, target)
    values = {who: float(work()) for who, work in variants.items()}
    pairs = ("ours, an image", "MeanIoU")  # a mean over (image, class) pairs, the others over classes
    for same in ([v for who, v in values.items() if who not in pairs], [values[who] for who in pairs if who in values]):
        if same and max(same) - min(same) > 1e-6:
            raise AssertionError(f"{name}: the mean IoUs differ: {values}")
    series = protocol.interleave(variants, rounds=rounds, most=4 * rounds, passes=2, lasting=0 if quick else 0.2)
    speed = {
        f"{ours} : {theirs}": protocol.compare(series, ours, theirs)
        for ours, theirs in (
            ("ours, no checks", "JaccardIndex, no checks"),
            ("ours", "JaccardIndex"),
            ("ours", "JaccardIndex, no checks"),
            ("ours, an image", "MeanIoU"),
        )
        if theirs in series
    }
    print(f"{name}: " + ", ".join(f"{pair} {protocol.shown(found)}" for pair, found in speed.items()), flush=True)
    milliseconds = {who: 1e3 * one.summary()["wall_median"] for who, one in series.items()}
    return {
        "what": name, "title": case.title, "milliseconds": milliseconds, "speed": speed, "values": values,
        "seconds": {who: one.summary() for who, one in series.items()},
    }  # fmt: skip


def _masks(case: Case, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Patches of classes, and a prediction that is right in four pixels of five."""
    generator = torch.Generator().manual_seed(0)
    n, y, x = shape
    coarse = torch.randint(0, case.classes, (n, y // 30, x // 30), generator=generator)
    target = coarse.repeat_interleave(30, 1).repeat_interleave(30, 2)
    wrong = torch.rand(target.shape, generator=generator) < 0.2
    preds = torch.where(wrong, torch.randint(0, case.classes, target.shape, generator=generator), target)
    return preds.to(case.dtype), target.to(case.dtype)


def _variants(case: Case, preds: Tensor, target: Tensor) -> dict[str, Callable[[], Tensor]]:
    k = case.classes

    def ours(check: bool) -> Tensor:
        return mean_iou(confusion_matrix(preds, target, k, validate_args=check))

    def an_image() -> Tensor:
        pairs = zip(preds, target, strict=True)
        return mean_iou(torch.stack([confusion_matrix(p, t, k) for p, t in pairs]), average="pair")

    def theirs(metric: Any) -> Tensor:
        metric.reset()
        metric.update(preds, target)
        return metric.compute()

    found: dict[str, Callable[[], Tensor]] = {
        "ours": partial(ours, True),
        "ours, no checks": partial(ours, False),
        "JaccardIndex": partial(theirs, MulticlassJaccardIndex(k)),
        "JaccardIndex, no checks": partial(theirs, MulticlassJaccardIndex(k, validate_args=False)),
    }
    if k < 100:  # it makes a map a class: gigabytes for many classes
        long = MeanIoU(k, input_format="index")
        found["ours, an image"] = an_image
        found["MeanIoU"] = partial(_mean_iou, long, preds.long(), target.long())
    return found


def _mean_iou(metric: Any, preds: Tensor, target: Tensor) -> Tensor:
    """MeanIoU takes int64 alone; the masks are cast before the clock."""
    metric.reset()
    metric.update(preds, target)
    return metric.compute()


if __name__ == "__main__":
    main()
