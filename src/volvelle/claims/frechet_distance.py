"""Fréchet distance between sets of pictures: how it follows disturbances, and what it owes to their number."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

    from volvelle.systems.generation.extractor import Extractor

CLAIM = Claim(
    title="Fréchet distance between sets of pictures",
    family="metrics",
    paper=Paper(
        "Heusel et al.",
        2017,
        "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
        "figure 3; the bias: Chong & Forsyth 2020, sections 1 and 3",
        "https://arxiv.org/abs/1706.08500",
    ),
    sentence="The FID captures the disturbance level very well by monotonically increasing",
    measured_by="features of EfficientNet-Lite0 (the paper: Inception) of Fashion-MNIST pictures against features of "
    "others under the six disturbances of the paper's figure, at three levels each; the closed form against diagonal "
    "covariances, scipy's matrix square root and the cost of the optimal map; normal distributions of known distance "
    "in growing samples, with the extrapolation of Chong & Forsyth (2020), and halves of the same pictures likewise",
    summary="One number for how far generated pictures are from real ones; comparable only for equal features and "
    "equally many pictures.",
    summary_zh="用特征的高斯近似衡量生成图像与真实图像的距离；只有特征网络和样本数相同时才可比较。",
    seconds={"quick": 60, "full": 300},
    parts=("functional.frechet_distance", "functional.feature_statistics"),
    recipe="volvelle train gan data=PATH",
)

LEVELS: dict[str, tuple[float, ...]] = {
    "noise": (0.25, 0.5, 0.75), "blur": (1.0, 2.0, 4.0), "black rectangles": (0.25, 0.5, 0.75),
    "swirl": (1.0, 2.0, 4.0), "salt and pepper": (0.1, 0.2, 0.3), "contamination": (0.25, 0.5, 0.75),
}  # fmt: skip
"""Share of noise, deviation in sixty-fourths of the side, side of five rectangles, radians at the centre, share of
pixels, share of foreign pictures. Level 0 leaves the pictures as they are."""
WIDTH = 32
"""Features of the normal distributions."""


def measure(budget: Budget) -> Measurement:
    """Disturb 200 pictures (full: 1000), and halve up to 400 (full: 4000)."""
    import torch

    from volvelle.claims.garments import two_threads
    from volvelle.errors import VolvelleError
    from volvelle.systems.generation.extractor import open_extractor

    count, sizes, draws = (200, (100, 200), 4) if budget == "quick" else (1000, (500, 1000, 2000), 20)
    try:
        extractor = open_extractor("efficientnet-lite0", size=28)
        real, others, foreign = drawn(max(count, 2 * sizes[-1]), count)
    except VolvelleError as error:
        return Measurement(unmeasurable=f"the pictures or EfficientNet-Lite0 cannot be had: {error}")
    with two_threads():
        curves, floor = disturbed(extractor, real[:count], others, foreign)
        halves = _halves(extractor, real, sizes)
    findings = [*_rising(curves, floor, extractor.name), *_closed(), *_known(draws), *_order(draws), *halves]
    notes = [
        "features are not Inception's, so no figure here is an FID, nor comparable with a published one",
        "the garments stand on black: black rectangles change nothing but the garment",
    ]
    setting = {
        "pictures": f"Fashion-MNIST, {count} on each side", "halves": list(sizes), "levels": dict(LEVELS),
        "normal distributions": f"{WIDTH} features, {draws} draws", "dtype": "fp32 features, fp64 distances",
    }  # fmt: skip
    peers = {"scipy.linalg.sqrtm": _scipy(), "torch": torch.__version__}
    return Measurement(findings, peers=peers, setting=setting, notes=notes, pictures={"levels": _picture(curves)})


def _scipy() -> str:
    import scipy

    return scipy.__version__


def drawn(real: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (n, 1, 28, 28) in [-1, 1]: for the one side, for the other, and scenes to contaminate these with."""
    import numpy as np
    import torch
    from torch.nn.functional import avg_pool2d

    from volvelle.claims.garments import garments
    from volvelle.data.scenes import Scenes

    (train, _), (test, _) = garments(real, count)
    scenes = Scenes(count, size=56, seed=0, part="val")
    grey = torch.from_numpy(np.stack([scenes.scene(i).image.mean(-1) for i in range(count)])).float()
    return 2 * train - 1, 2 * test - 1, 2 * avg_pool2d(grey[:, None] / 255, 2) - 1


def disturb(pictures: Tensor, kind: str, level: float, foreign: Tensor) -> Tensor:
    """The pictures under one disturbance; seeded, so that higher levels disturb the same places more."""
    import torch

    draw = torch.Generator().manual_seed(7)
    n, _, side, _ = pictures.shape
    if kind == "noise":
        return (1 - level) * pictures + level * torch.randn(pictures.shape, generator=draw).clamp(-1, 1)
    if kind == "blur":
        return _blurred(pictures, level * side / 64)
    if kind == "black rectangles":
        corner = torch.rand(n, 5, 2, 1, generator=draw) * (1 - level) * side
        place = torch.arange(side)
        inside = (place >= corner) & (place < corner + level * side / 2)
        hidden = (inside[:, :, 0, :, None] & inside[:, :, 1, None, :]).any(1, keepdim=True)
        return torch.where(hidden, -1.0, pictures)
    if kind == "swirl":
        return _swirled(pictures, level)
    if kind == "salt and pepper":
        chance, side_of = (torch.rand(pictures.shape, generator=draw) for _ in range(2))
        return torch.where(chance < level, torch.where(side_of < 0.5, -1.0, 1.0), pictures)
    taken = (torch.rand(n, generator=draw) < level)[:, None, None, None]
    return torch.where(taken, foreign, pictures)


def _blurred(pictures: Tensor, deviation: float) -> Tensor:
    import torch
    from torch.nn.functional import conv2d, pad

    reach = math.ceil(3 * deviation)
    line = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * deviation**2))
    line = (line / line.sum()).view(1, 1, 1, -1)
    wide = pad(pictures, [reach] * 4, mode="replicate")
    return conv2d(conv2d(wide, line), line.transpose(2, 3))


def _swirled(pictures: Tensor, turns: float) -> Tensor:
    """Turned about the centre, the more the nearer: by `turns` radians there, by a tenth of it at the corners."""
    import torch
    from torch.nn.functional import grid_sample

    line = (torch.arange(pictures.shape[-1]) + 0.5) * 2 / pictures.shape[-1] - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    angle = turns * torch.exp(-(x.square() + y.square()).sqrt() * math.log(10) / math.sqrt(2))
    places = torch.stack((x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()), -1)
    return grid_sample(pictures, places.expand(len(pictures), -1, -1, -1), "bilinear", "border", align_corners=False)


def distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of features (n, d) and (m, d)."""
    from volvelle.parts.metrics.frechet import feature_statistics, frechet_distance

    return float(frechet_distance(*feature_statistics(a), *feature_statistics(b)))


def disturbed(
    extractor: Extractor, real: Tensor, others: Tensor, foreign: Tensor
) -> tuple[dict[str, list[float]], float]:
    """Distances of `others` under each disturbance from `real`, by level, and without a disturbance."""
    from volvelle.train.samples_measure import features_of

    truth = features_of(real, extractor)
    floor = distance(truth, features_of(others, extractor))
    curves = {
        kind: [floor, *(distance(truth, features_of(disturb(others, kind, one, foreign), extractor)) for one in levels)]
        for kind, levels in LEVELS.items()
    }
    return curves, floor


def _rising(curves: dict[str, list[float]], floor: float, name: str) -> list[Finding]:
    falls = [kind for kind, values in curves.items() if any(b <= a for a, b in pairwise(values))]
    return [
        at_most(f"disturbances of {len(curves)} under which FD-{name} does not rise at every level", len(falls), 0),
        Finding("which", ", ".join(falls) or "none"),
        Finding("undisturbed pictures of the other part (the floor)", floor),
        *(
            Finding(
                f"{kind} at {', '.join(f'{level:g}' for level in LEVELS[kind])}",
                ", ".join(f"{v:.4g}" for v in values[1:]),
            )
            for kind, values in curves.items()
        ),
    ]


def _normal(seed: int, d: int) -> tuple[Tensor, Tensor]:
    """A mean and a covariance that is no multiple of another one's."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(d, d, generator=draw, dtype=torch.float64) / d**0.5
    return torch.randn(d, generator=draw, dtype=torch.float64), root @ root.T + 0.1 * torch.eye(d, dtype=torch.float64)


def _closed() -> list[Finding]:
    """The formula: written out, by another square root, and as the cost of moving one distribution onto the other."""
    import numpy as np
    import torch
    from scipy.linalg import sqrtm

    from volvelle.parts.metrics.frechet import frechet_distance

    worst = dict.fromkeys(("diagonal", "scipy", "cost", "moved"), 0.0)
    for seed in range(10):
        (m1, s1), (m2, s2) = _normal(seed, WIDTH), _normal(100 + seed, WIDTH)
        a, b = s1.diagonal(), s2.diagonal()
        by_hand = float((m1 - m2).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
        found = float(frechet_distance(m1, torch.diag(a), m2, torch.diag(b)))
        worst["diagonal"] = max(worst["diagonal"], abs(found / by_hand - 1))
        found = float(frechet_distance(m1, s1, m2, s2))
        root = np.real(np.asarray(sqrtm((s1 @ s2).numpy()))).trace()
        other = float((m1 - m2).square().sum() + s1.trace() + s2.trace()) - 2 * float(root)
        worst["scipy"] = max(worst["scipy"], abs(found / other - 1))
        # The optimal map: T = S1^-1/2 (S1^1/2 S2 S1^1/2)^1/2 S1^-1/2 of what is beside the mean.
        half, back = _power(s1, 0.5), _power(s1, -0.5)
        moved = back @ _power(half @ s2 @ half, 0.5) @ back
        rest = torch.eye(WIDTH, dtype=torch.float64) - moved
        cost = float((m1 - m2).square().sum() + (rest @ s1 @ rest.T).trace())
        worst["cost"] = max(worst["cost"], abs(found / cost - 1))
        worst["moved"] = max(worst["moved"], float((moved @ s1 @ moved.T - s2).abs().max()))
    return [
        at_most("diagonal covariances: relative difference from |Δμ|² + Σ (√a - √b)²", worst["diagonal"], 1e-12),
        at_most("full covariances: relative difference from scipy's sqrtm", worst["scipy"], 1e-9),
        at_most("relative difference from the mean squared length of the optimal map", worst["cost"], 1e-9),
        at_most("what that map makes of the first covariance, less the second", worst["moved"], 1e-10),
    ]


def _power(matrix: Tensor, exponent: float) -> Tensor:
    import torch

    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


def sampled(d: int, scale: float, n: int, draws: int) -> float:
    """Mean distance of n samples of N(0, scale I) from N(0, I) itself, d features."""
    import torch

    from volvelle.parts.metrics.frechet import feature_statistics, frechet_distance

    draw = torch.Generator().manual_seed(n)
    truth = torch.zeros(d).double(), torch.eye(d, dtype=torch.float64)
    found = []
    for _ in range(draws):
        x = torch.randn(n, d, generator=draw, dtype=torch.float64) * scale**0.5
        found.append(float(frechet_distance(*truth, *feature_statistics(x))))
    return statistics.mean(found)


def extrapolated(values: dict[int, float]) -> float:
    """Chong & Forsyth's estimate for infinitely many pictures: where the line over 1 / n meets the axis."""
    import numpy as np

    return float(np.polyfit([1 / n for n in values], list(values.values()), 1)[1])


def _known(draws: int) -> list[Finding]:
    """The bias where the distance is known: d (1 - √0.5)²."""
    truth = WIDTH * (1 - 0.5**0.5) ** 2
    values = {n: sampled(WIDTH, 0.5, n, draws) for n in (200, 400, 800, 1600)}
    biases = [value - truth for value in values.values()]
    at_infinity = abs(extrapolated(values) - truth)
    return [
        at_least("normal distributions: least excess over the known distance, 200 to 1600 samples", min(biases), 0.0),
        at_least("excess with 200 samples over that with 400, about 2", biases[0] / biases[1], 1.5, "x"),
        at_most("error of the extrapolation over that with 1600 samples", at_infinity / biases[-1], 0.5, "x"),
        Finding("known distance", truth),
        *(Finding(f"measured with {n} samples, mean", value) for n, value in values.items()),
    ]


def _order(draws: int) -> list[Finding]:
    """Two models of which the worse one has the smaller bias: with few samples it looks better."""
    d, few, many = 64, 64, 6400
    perfect, narrow = ({n: sampled(d, scale, n, draws) for n in (few, many)} for scale in (1.0, 0.8))
    return [
        at_least(
            f"distance of a perfect model over that of a worse one, {few} samples", perfect[few] / narrow[few], 1.0, "x"
        ),
        at_most(f"the same, {many} samples", perfect[many] / narrow[many], 1.0, "x"),
    ]


def _halves(extractor: Extractor, pictures: Tensor, sizes: tuple[int, ...]) -> list[Finding]:
    """Halves of one set: their distance is bias alone."""
    from volvelle.train.samples_measure import features_of

    features = features_of(pictures[: 2 * sizes[-1]], extractor)
    values = {}
    for n in sizes:
        parts = features.split(n)
        values[n] = statistics.mean(distance(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True))
    first, last = values[sizes[0]], values[sizes[-1]]
    return [
        at_least(
            f"halves of one set: distance of {sizes[0]} pictures over that of {sizes[-1]}", first / last, 1.0, "x"
        ),
        Finding("the least that could be expected if it went with 1 / n", sizes[-1] / sizes[0], "x"),
        Finding("extrapolated to infinitely many, where 0 is right", extrapolated(values)),
        *(Finding(f"halves of {n} pictures each", value) for n, value in values.items()),
    ]


def _picture(curves: dict[str, list[float]]) -> str:
    from volvelle.train.charts import Series, line_chart, standalone

    lines = [Series(kind, list(enumerate(map(float, values))), dots=True) for kind, values in curves.items()]
    return standalone(line_chart(lines, x_label="level of the disturbance", y_label="Fréchet distance", log_y=True))
