"""A network grown in depth, width and resolution at once against one grown in a single direction."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least

if TYPE_CHECKING:
    from torch import Tensor

    from volvelle.systems.backbone.config import MobileConfig
    from volvelle.systems.backbone.model import Backbone
    from volvelle.systems.backbone.scaling import Scaling

CLAIM = Claim(
    title="Compound scaling: depth, width and resolution together",
    family="backbones",
    paper=Paper(
        "Tan & Le",
        2019,
        "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
        "section 5.3, table 7",
        "https://arxiv.org/abs/1905.11946",
    ),
    sentence="our compound scaling method can further improve accuracy … than other single-dimension scaling methods",
    measured_by="the test accuracy of a small network of inverted residuals on Fashion-MNIST, grown to about four "
    "times its arithmetic as in the paper's table 7: depth by 4, width by 2, resolution by 2, or all at once by 1.4, "
    "1.2 and 1.3; the same pictures, steps and rates for all",
    summary="Grow a convolutional network in depth, width and resolution at once, by one rule, instead of in one "
    "direction only.",
    summary_zh="按同一规则同时扩大卷积网络的深度、宽度和分辨率，而不是只扩大其中之一。",
    seconds={"quick": 60, "full": 900},
    parts=("nn.InvertedResidual", "nn.SqueezeExcite"),
    recipe="volvelle train classify data=fashion-mnist backbone=efficientnet-b0 weights=none",
)

SIDE = 16
"""Pixels of the unscaled network's pictures: Fashion-MNIST's 28 leave room to grow."""
GROWN: dict[str, tuple[float, float, float]] = {
    "unscaled": (1.0, 1.0, 1.0),
    "depth x 4": (1.0, 4.0, 1.0),
    "width x 2": (2.0, 1.0, 1.0),
    "resolution x 2": (1.0, 1.0, 2.0),
    "compound": (1.2, 1.4, 1.3),
}
"""Factors of width, depth and resolution."""
SINGLE = ("depth x 4", "width x 2", "resolution x 2")


def measure(budget: Budget) -> Measurement:
    """Train every network with one seed and few steps (full: three seeds)."""
    from volvelle.claims.garments import garments, two_threads
    from volvelle.errors import VolvelleError

    seeds, steps, count = (1, 60, 4_000) if budget == "quick" else (3, 450, 20_000)
    try:
        sets = garments(count, 1_000 if budget == "quick" else 5_000)
    except VolvelleError as error:
        return Measurement(unmeasurable=str(error))
    found: dict[str, list[float]] = {}
    arithmetic = {}
    with two_threads():
        for name, (width, depth, resolution) in GROWN.items():
            config = network(scaling(width, depth, resolution))
            arithmetic[name] = macs(config)
            found[name] = [accuracy(config, sets, seed, steps) for seed in range(seeds)]
    findings = []
    for name, values in found.items():
        spread = (min(values), max(values))
        findings.append(Finding(f"{name}: test accuracy", 100 * statistics.mean(values), "%", spread=(
            100 * spread[0], 100 * spread[1])))  # fmt: skip
        findings.append(Finding(f"{name}: multiply-accumulates", arithmetic[name] / arithmetic["unscaled"], "x"))
    means = {name: 100 * statistics.mean(values) for name, values in found.items()}
    best = max(SINGLE, key=lambda name: means[name])
    gain = means["compound"] - means[best]
    findings.append(at_least(f"compound above the best single direction ({best}), means", gain, 0.0, "points"))
    setting = {"side": SIDE, "steps": steps, "batch": 64, "seeds": seeds, "pictures": count}
    notes = ["rounding channels to 8 and repeats up makes the arithmetic differ; the figures say by how much"]
    return Measurement(findings, setting=setting, notes=notes)


def scaling(width: float, depth: float, resolution: float) -> Scaling:
    """The factors as a `Scaling`; an even number of pixels."""
    from volvelle.systems.backbone.scaling import Scaling

    return Scaling(width, depth, 2 * round(SIDE * resolution / 2), dropout=0.0)


def network(by: Scaling) -> MobileConfig:
    """The small network, scaled: three stages at strides 2, 4 and 8."""
    from volvelle.systems.backbone.config import MobileConfig, MobileStage
    from volvelle.systems.backbone.scaling import scale

    stages = (
        MobileStage(3, 1, 1, 16, 1, 0.25),
        MobileStage(3, 2, 4, 24, 2, 0.25),
        MobileStage(3, 2, 4, 40, 2, 0.25),
    )
    base = MobileConfig(name="small", stages=stages, stem=16, head=128, activation="silu", classes=10)
    return scale(base, by)


def macs(config: MobileConfig) -> int:
    """Multiply-accumulates of one picture."""
    from volvelle.inspect.flops import count_flops

    size = config.preprocessing.size
    return count_flops(_build(config), (1, 3, size, size)).macs


def accuracy(
    config: MobileConfig, sets: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], seed: int, steps: int
) -> float:
    """Train on the first set and return the share of the second that is named rightly."""
    import torch
    from torch.nn import functional as F

    from volvelle.claims.garments import train

    torch.manual_seed(seed)
    model, size = _build(config), config.preprocessing.size

    def prepared(images: Tensor) -> Tensor:
        resized = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        return resized.sub(0.286).div(0.353).expand(-1, 3, -1, -1)  # the data's mean and deviation

    (images, labels), (others, truth) = sets

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(model(prepared(images[rows])), labels[rows])

    train(model, loss, len(images), steps, seed=seed)
    with torch.no_grad():
        answers = torch.cat([model(prepared(part)).argmax(1) for part in others.split(500)])
    return float((answers == truth).double().mean())


def _build(config: MobileConfig) -> Backbone:
    from volvelle.systems.backbone.load import build

    return build(config)
