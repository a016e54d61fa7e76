"""ThunderNet: what its blocks are worth on scenes, what it costs, and how many pictures a second it looks at."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor, nn

    from volvelle.systems.backbone.model import Backbone
    from volvelle.systems.detection.model import Detector

CLAIM = Claim(
    title="ThunderNet: two-stage detection on small devices",
    family="detection",
    paper=Paper(
        "Qin et al.",
        2019,
        "ThunderNet: Towards Real-time Generic Object Detection",
        "sections 3.2 and 3.3, tables 1 and 2",
        "https://arxiv.org/abs/1903.11752",
    ),
    sentence="context enhancement and spatial attention generate more discriminative features for a light two-stage "
    "detector of 262 to 1300 MFLOPs",
    measured_by="multiply-accumulates of the detectors at 320 pixels, counted layer by layer; detectors on one frozen "
    "ImageNet encoder, without context enhancement, without attention, with RoIAlign of as many numbers in place of "
    "position-sensitive pooling, against all three: mAP50 on scenes of which none was trained on (quick: one seed)",
    summary="A small proposer, one map enriched by context, attention from proposals, and pooling by position: two "
    "stages at the price of one.",
    summary_zh="轻量候选网络、上下文增强、空间注意力与位置敏感池化：以单阶段的代价做两阶段检测。",
    seconds={"quick": 60, "full": 900},
    parts=("functional.ps_roi_align", "functional.nms"),
    recipe="volvelle train detect data=FOLDER",
)

PAPER = {"snet49": 262, "snet146": 473, "snet535": 1300}
"""Million multiply-accumulates at 320 pixels, table 2 of the paper, which calls them FLOPs."""
BACKBONE = {"snet49": 49, "snet146": 146, "snet535": 535}
"""The same of the backbones at 224 pixels, from which they have their names."""
CHANNELS, BINS = 5, 7


def measure(budget: Budget) -> Measurement:
    """Costs, pictures a second, and the ablations."""
    from volvelle.claims.garments import two_threads
    from volvelle.errors import VolvelleError

    seeds, steps, pictures = (1, 80, 128) if budget == "quick" else (3, 500, 600)
    findings, notes = _costs(), []
    with two_threads():
        findings.append(_rate(5 if budget == "quick" else 20))
        try:
            findings += _ablations(seeds, steps, pictures)
        except VolvelleError as error:
            notes.append(f"what the blocks are worth was not measured: {error}")
    setting = {
        "scenes": pictures, "pixels": 128, "encoder": "efficientnet-lite0, frozen", "steps": steps, "seeds": seeds,
        "dtype": "fp32",
    }  # fmt: skip
    return Measurement(findings, setting=setting, notes=notes)


def products(model: nn.Module, side: int) -> int:
    """Multiply-accumulates of all convolutions and linear layers on one picture of side x side pixels."""
    import torch

    from volvelle.claims.detect_scenes import counted

    return counted(model.eval(), lambda: model(torch.zeros(1, 3, side, side)))


def costs() -> dict[str, tuple[float, float]]:
    """Million products of each backbone at 224 pixels with its classifier, and of each detector at 320."""
    from volvelle.systems.backbone.load import backbone
    from volvelle.systems.detection.load import thundernet

    return {name: (products(backbone(name), 224) / 1e6, products(thundernet(name), 320) / 1e6) for name in PAPER}


def _costs() -> list[Finding]:
    found = costs()
    findings = []
    for name, (alone, whole) in found.items():
        what = f"{name} at 320 pixels, {whole:.1f} M products: distance from the paper's {PAPER[name]}"
        apart = 100 * abs(whole / PAPER[name] - 1)
        findings.append(Finding(what, apart, "%") if name == "snet146" else at_most(what, apart, 1.0, "%"))
        if name == "snet146":
            # The table's channels give more than the network's name says: with the name's 146 the sum agrees.
            named = whole - (alone - BACKBONE[name]) * (320 / 224) ** 2
            what = f"the same if its backbone had the {BACKBONE[name]} M of its name instead of {alone:.1f}"
            findings.append(at_most(what, 100 * abs(named / PAPER[name] - 1), 1.0, "%"))
    return findings


def _rate(passes: int) -> Finding:
    """Pictures a second of SNet49 at 320 pixels, bytes in and boxes out, random weights."""
    import torch

    from volvelle.systems.detection.inference import detect, ready
    from volvelle.systems.detection.load import thundernet

    model = ready(thundernet("snet49", 3))
    pixels = torch.randint(0, 256, (1, 3, 320, 320), dtype=torch.uint8)
    seconds = []
    for _ in range(passes + 2):
        start = time.perf_counter()
        detect(model, pixels)
        seconds.append(time.perf_counter() - start)
    rates = [1 / one for one in seconds[2:]]
    what = "snet49 at 320 pixels, one picture at a time"
    return Finding(what, statistics.median(rates), "images/s", spread=(min(rates), max(rates)))


def _ablations(seeds: int, steps: int, pictures: int) -> list[Finding]:
    from volvelle.claims.detect_scenes import map50, scenes, train
    from volvelle.systems.backbone.load import backbone

    encoder = backbone("efficientnet-lite0", weights="imagenet")
    parts = [scenes(encoder, count, part) for count, part in ((pictures, "train"), (max(32, pictures // 4), "val"))]
    runs: dict[str, list[float]] = {}
    for variant in ("all", "no context", "no attention", "RoIAlign"):
        for seed in range(seeds):
            model = _variant(variant, encoder, seed)
            train(model, parts[0], steps, seed)
            runs.setdefault(variant, []).append(map50(model, parts[1]))
    mean = {variant: statistics.mean(values) for variant, values in runs.items()}
    named = {
        "no context": "context enhancement", "no attention": "spatial attention",
        "RoIAlign": "position-sensitive pooling (against RoIAlign of as many numbers)",
    }  # fmt: skip
    findings = [
        at_least(f"mAP50 gained by {what}", mean["all"] - mean[variant], 0.0, "points")
        for variant, what in named.items()
    ]
    for variant, values in runs.items():
        findings.append(Finding(f"mAP50, {variant}", mean[variant], "%", spread=(min(values), max(values))))
    return findings


def _variant(variant: str, encoder: Backbone, seed: int) -> Detector:
    """ThunderNet with 10 classes behind a frozen encoder, less one of its blocks."""
    import copy

    import torch

    from volvelle.claims.detect_scenes import ANCHORS, SIZE
    from volvelle.systems.detection import config as c
    from volvelle.systems.detection.compositions import compose
    from volvelle.systems.detection.heads import FullyConnected

    torch.manual_seed(seed)
    inputs = CHANNELS * BINS**2
    composition = c.ThunderNet(alpha=CHANNELS, bins=BINS, attention=variant != "no attention", hidden=(256,))
    numbers = c.RPN(anchors=ANCHORS, before=300, training=100, testing=60)
    classes = tuple(f"garment {i}" for i in range(10))
    config = c.DetectorConfig(encoder.config.name, composition, classes, rpn=numbers, size=SIZE)
    model = compose(config, copy.deepcopy(encoder))
    if variant == "no context":
        model.neck = _one_map(encoder.channels[-2], inputs)
    if variant == "RoIAlign":
        model.roi_head.scorer = FullyConnected(_narrow(inputs), inputs, inputs, (256,), 10)
    return model


def _one_map(channels: int, out: int) -> nn.Module:
    """The map of stride 16 alone, brought to as many channels."""
    from torch import nn

    class OneMap(nn.Module):
        def __init__(self):
            super().__init__()
            self.lateral = nn.Conv2d(channels, out, 1)

        def forward(self, features: Any, sizes: Any, image: Any) -> tuple[Tensor, Tensor]:
            found = self.lateral(features[-2])
            return found, found

    return OneMap()


def _narrow(channels: int) -> nn.Module:
    """RoIAlign on so few channels that the head gets as many numbers."""
    from torch import nn

    from volvelle.systems.detection.pools import Align

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.reduce, self.pool = nn.Conv2d(channels, CHANNELS, 1), Align(BINS, 16)

        def forward(self, maps: Tensor, regions: Tensor, features: Tensor) -> Tensor:
            narrow = self.reduce(maps)
            return self.pool(narrow, regions, narrow)

    return Narrow()
