"""Precision and recall of a generator: what it makes that is not real, and what is real that it cannot make."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

CLAIM = Claim(
    title="Precision and recall of generators by manifolds of neighbours",
    family="metrics",
    paper=Paper(
        "Kynkäänniemi et al.",
        2019,
        "Improved Precision and Recall Metric for Assessing Generative Models",
        "abstract, sections 2 and 3",
        "https://arxiv.org/abs/1904.06991",
    ),
    sentence="the metric can separately and reliably measure the quality and the coverage of samples, which figures "
    "such as FID group into one",
    measured_by="real garments as the samples of a generator: all of them, those of half of the classes (coverage "
    "lost), and all of them under noise (quality lost); precision, recall and Fréchet distance of each by principal "
    "components of pixels; a plain double loop on small sets",
    summary="Two figures in place of one: how much of what a generator makes looks real, and how much of what is real "
    "it can make.",
    summary_zh="用两个指标代替一个：生成的有多少像真的，真实的有多少能被生成。",
    seconds={"quick": 40, "full": 120},
    parts=("functional.manifold_precision_recall",),
)

COUNT: Mapping[Budget, int] = {"quick": 1000, "full": 5000}
"""Pictures of a set."""
COMPONENTS = 32
"""Principal components of pixels that stand for a picture."""
NOISES = (0.3, 0.6, 1.0)
"""Standard deviations of the noise on pixels in 0 .. 1: the last one buries the picture."""


def measure(budget: Budget) -> Measurement:
    """1,000 pictures a set (full: 5,000)."""
    from volvelle.claims.garments import two_threads
    from volvelle.errors import VolvelleError
    from volvelle.parts.metrics import frechet, manifold_precision_recall

    count = COUNT[budget]
    try:
        real, sets = _sets(count)
    except VolvelleError as error:
        return Measurement(unmeasurable=f"Fashion-MNIST cannot be had: {error}")
    known = frechet.feature_statistics(real)
    found: dict[str, tuple[float, float]] = {}
    findings = []
    with two_threads():
        for name, fake in sets.items():
            precision, recall = map(float, manifold_precision_recall.manifold_precision_recall(real, fake))
            found[name] = precision, recall
            distance = float(frechet.frechet_distance(*known, *frechet.feature_statistics(fake)))
            values = {"precision": precision, "recall": recall, "Fréchet distance": distance}
            findings += [Finding(f"{name}: {what}", value) for what, value in values.items()]
        apart = _loops(real[:200], sets["half of the classes"][:150])
    findings += _bounds(found)
    findings.append(at_most("difference from a double loop over points", apart, 0))
    setting = {"pictures": count, "neighbours k": 3, "features": f"{COMPONENTS} principal components of pixels"}
    notes = [
        "Recall of half of the classes stays above a half: classes lie near each other, and what a garment of one "
        "class covers may be another's.",
        "Under noise recall holds because the noisy samples lie far apart, so their neighbourhoods are wide.",
    ]
    return Measurement(findings, peers={"a double loop in Python": ""}, setting=setting, notes=notes)


def _sets(count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Features of real garments, and of other real ones that stand for a generator's."""
    import torch

    from volvelle.claims.garments import garments

    (images, labels), (others, other_labels) = garments(3 * count, 2 * count)
    real, fake = images[:count], others[:count]
    half = torch.cat((images[count:], others))[torch.cat((labels[count:], other_labels)) < 5][:count]
    sets = {"all": fake, "half of the classes": half}
    draw = torch.Generator().manual_seed(0)
    for noise in NOISES:
        sets[f"noise of {noise}"] = fake + noise * torch.randn(fake.shape, generator=draw)
    torch.manual_seed(0)
    directions = torch.pca_lowrank(real.flatten(1), COMPONENTS, niter=4)[2]
    return real.flatten(1) @ directions, {name: x.flatten(1) @ directions for name, x in sets.items()}


def _bounds(found: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """Each fault lowers one of the two, and leaves the other."""
    (precision, recall), half = found["all"], found["half of the classes"]
    noisy = [found[f"noise of {noise}"] for noise in NOISES]
    falls = [before[0] - after[0] for before, after in itertools.pairwise([found["all"], *noisy])]
    return [
        at_least("half of the classes: precision over that of all", half[0] / precision, 0.9, "x"),
        at_most("half of the classes: recall over that of all", half[1] / recall, 0.7, "x"),
        at_least("noise: least fall of the precision from one to the next", min(falls), 0.0),
        at_most("buried in noise: precision over that of all", noisy[-1][0] / precision, 0.5, "x"),
        at_least("noise: least recall over that of all", min(r for _, r in noisy) / recall, 0.9, "x"),
    ]


def _loops(real: Tensor, fake: Tensor, k: int = 3) -> float:
    """The definition, point by point: largest difference of precision and recall."""
    import math

    from volvelle.parts.metrics import manifold_precision_recall

    def share(points: list[list[float]], around: list[list[float]]) -> float:
        radii = [sorted(math.dist(a, b) for b in around)[k] for a in around]
        inside = [any(math.dist(p, a) <= r for a, r in zip(around, radii, strict=True)) for p in points]
        return sum(inside) / len(points)

    ours = manifold_precision_recall.manifold_precision_recall(real.double(), fake.double(), k)
    x, y = real.double().tolist(), fake.double().tolist()
    # A share is a whole number over the points: rounded, so that fp32 means of it compare.
    return max(abs(round(float(a) - b, 6)) for a, b in zip(ours, (share(y, x), share(x, y)), strict=True))
