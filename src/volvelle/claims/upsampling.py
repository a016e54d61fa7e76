"""Checkerboards of learned upsampling: at the start, after a few steps, and at the end, with and without ICNR."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor, nn

CLAIM = Claim(
    title="Upsampling without checkerboards: ICNR",
    family="resampling",
    paper=Paper(
        "Aitken et al.",
        2017,
        "Checkerboard artifact free sub-pixel convolution: A note on sub-pixel convolution, resize convolution and "
        "convolution resize",
        "abstract and section 3",
        "https://arxiv.org/abs/1707.02937",
    ),
    sentence="Compared to sub-pixel convolution initialized with schemes designed for standard convolution kernels, it "
    "is free from checkerboard artifacts immediately after initialization. Compared to resize convolution, at the same "
    "computational complexity, it has more modelling power and converges to solutions with smaller test errors",
    measured_by="networks that double the size of Fashion-MNIST pictures, alike but for the upsampling: share of the "
    "variance of their output at the lattice's frequencies, before training, after a few steps and at the end; squared "
    "error on pictures of which none was trained on (quick: one seed and no error, full: three seeds)",
    summary="A sub-pixel convolution that starts as nearest upsampling has no checkerboard to unlearn.",
    summary_zh="让亚像素卷积从最近邻上采样起步，就没有需要消除的棋盘伪影。",
    seconds={"quick": 60, "full": 900},
    parts=("functional.icnr_init", "nn.Upsample2d", "functional.checkerboard"),
)

KINDS = ("icnr", "drawn one by one", "transposed", "nearest", "bilinear")
CLEAN = 1e-6
"""A share of the variance that is rounding."""
FEW = 10
"""Steps after which a network is looked at."""


def measure(budget: Budget) -> Measurement:
    """Train every kind of upsampling from the same start."""
    from volvelle.claims.garments import garments, two_threads
    from volvelle.errors import VolvelleError
    from volvelle.parts.resampling.checkerboard import checkerboard

    seeds, steps, rows, tests = (1, FEW, 1000, 200) if budget == "quick" else (3, 600, 20000, 2000)
    try:
        (images, _), (others, _) = garments(rows, tests)
    except VolvelleError as error:
        return Measurement(unmeasurable=f"Fashion-MNIST cannot be had: {error}")
    with two_threads():
        runs = {kind: [run(kind, images, others, steps, seed) for seed in range(seeds)] for kind in KINDS}
    findings = _findings(runs, steps, float(checkerboard(others).mean()))
    setting = {
        "data": f"Fashion-MNIST 14 x 14 to 28 x 28, {rows} to train, {tests} to test",
        "steps": steps, "batch": 64, "seeds": seeds, "width": WIDTH, "dtype": "fp32",
    }  # fmt: skip
    return Measurement(findings, setting=setting, peers={"pictures": "the originals in full size"})


WIDTH = 24


def network(kind: str, seed: int) -> nn.Sequential:
    """Two convolutions and the upsampling; weights of the first two are those of the seed for every kind."""
    import torch
    from torch import nn

    from volvelle.parts.resampling.upsample import Upsample2d

    torch.manual_seed(seed)
    body = [nn.Conv2d(1, WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU()]
    match kind:
        case "transposed" | "nearest" | "bilinear":
            last = Upsample2d(WIDTH, 1, method=kind)
        case _:
            last = Upsample2d(WIDTH, 1, method="pixel_shuffle")
    if kind == "drawn one by one":
        assert last.bias is not None
        bound = 1 / (9 * WIDTH) ** 0.5  # nn.Conv2d's own
        nn.init.uniform_(last.weight, -bound, bound)
        nn.init.uniform_(last.bias, -bound, bound)
    return nn.Sequential(*body, last)


def run(kind: str, images: Tensor, others: Tensor, steps: int, seed: int) -> dict[str, float]:
    """The checkerboard in the output for `others` at the start, after `FEW` steps and at the end; the error there."""
    import torch
    from torch.nn.functional import avg_pool2d, mse_loss

    from volvelle.claims.garments import train
    from volvelle.parts.resampling.checkerboard import checkerboard

    net, found = network(kind, seed), {}
    small = avg_pool2d(images, 2)

    def look(when: str) -> None:
        with torch.no_grad():
            out = torch.cat([net(part) for part in avg_pool2d(others, 2).split(250)])
        found[when] = float(checkerboard(out).mean())
        found["error"] = float(mse_loss(out, others))

    look("start")
    loss = lambda rows: mse_loss(net(small[rows]), images[rows])  # noqa: E731
    train(net, loss, len(images), FEW, seed=seed)
    look("few")
    if steps > FEW:
        train(net, loss, len(images), steps - FEW, seed=seed + 1000)
    look("end")
    return found


def _findings(runs: dict[str, list[dict[str, float]]], steps: int, originals: float) -> list[Finding]:
    def mean(kind: str, what: str) -> float:
        return statistics.mean(each[what] for each in runs[kind])

    def worst(kind: str, what: str) -> float:
        return max(each[what] for each in runs[kind])

    findings = [
        at_most("checkerboard at the start with ICNR", worst("icnr", "start"), CLEAN),
        at_least("the same with kernels drawn one by one", min(r["start"] for r in runs["drawn one by one"]), 0.01),
        at_most(
            f"after {FEW} steps, with ICNR over drawn one by one",
            mean("icnr", "few") / mean("drawn one by one", "few"),
            0.5,
            "x",
        ),
    ]
    if steps > FEW:
        gain = mean("icnr", "error") / mean("nearest", "error")
        findings.append(at_most("test error of ICNR over resize convolution, equal multiplications", gain, 1.0, "x"))
    findings.append(Finding("checkerboard in the original pictures", originals))
    for kind, each in runs.items():
        for what, name in (("start", "at the start"), ("few", f"after {FEW} steps"), ("end", f"after {steps} steps")):
            values = [r[what] for r in each]
            if what != "end" or steps > FEW:
                spread = (min(values), max(values))
                findings.append(Finding(f"{kind}: checkerboard {name}", statistics.mean(values), spread=spread))
        if steps > FEW:
            errors = [r["error"] for r in each]
            spread = (min(errors), max(errors))
            findings.append(Finding(f"{kind}: squared test error", statistics.mean(errors), spread=spread))
    return findings
