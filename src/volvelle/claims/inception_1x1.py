"""The 1 x 1 reductions of Inception: what they save, and what they cost in accuracy."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor, nn

CLAIM = Claim(
    title="Inception: 1 x 1 reductions before wide kernels",
    family="convolution",
    paper=Paper(
        "Szegedy et al.",
        2015,
        "Going Deeper with Convolutions",
        "section 4, figure 2 and table 1",
        "https://arxiv.org/abs/1409.4842",
    ),
    sentence="1x1 convolutions are used to compute reductions before the expensive 3x3 and 5x5 convolutions; it allows "
    "for increasing the number of units at each stage significantly without an uncontrolled blow-up in computational "
    "complexity",
    measured_by="multiplications of GoogLeNet's nine blocks as counted in a forward pass, against the paper's table "
    "and against the same blocks without reductions; small networks of three blocks with and without them on "
    "Fashion-MNIST at equal steps (quick: one seed, full: three)",
    summary="Thin 1 x 1 convolutions before the wide ones make parallel branches affordable.",
    summary_zh="在大卷积核之前先用 1×1 卷积降维，使并行分支的计算量可以承受。",
    seconds={"quick": 60, "full": 900},
    parts=("nn.InceptionBlock", "functional.inception_block"),
)

GOOGLENET = {
    "3a": (192, (64, 96, 128, 16, 32, 32), 28, 128),
    "3b": (256, (128, 128, 192, 32, 96, 64), 28, 304),
    "4a": (480, (192, 96, 208, 16, 48, 64), 14, 73),
    "4b": (512, (160, 112, 224, 24, 64, 64), 14, 88),
    "4c": (512, (128, 128, 256, 24, 64, 64), 14, 100),
    "4d": (512, (112, 144, 288, 32, 64, 64), 14, 119),
    "4e": (528, (256, 160, 320, 32, 128, 128), 14, 170),
    "5a": (832, (256, 160, 320, 32, 128, 128), 7, 54),
    "5b": (832, (384, 192, 384, 48, 128, 128), 7, 71),
}
"""Table 1: width of the input, the six columns, size of the maps, operations in millions."""
SMALL = ((16, 16, 32, 4, 8, 8), (32, 24, 48, 8, 16, 16), (48, 32, 64, 8, 24, 24))
"""The three blocks of the networks that are trained."""
LOSS = 1.0
"""Points of accuracy that the reductions may cost."""


def measure(budget: Budget) -> Measurement:
    """Count, then train."""
    from volvelle.claims.garments import garments, two_threads, unless_missing

    seeds, steps, rows, tests = (1, 60, 6000, 1000) if budget == "quick" else (3, 500, 30000, 4000)
    findings, notes = _counts(), []
    with unless_missing(notes):
        data = garments(rows, tests)
        with two_threads():
            runs = {kind: [accuracy(kind, data, steps, s) for s in range(seeds)] for kind in (True, False)}
        findings += _accuracies(runs, steps)
    notes.append("5a: 51 million follow from the widths that the paper's table gives, it prints 54")
    setting = {"data": f"Fashion-MNIST, {rows} to train, {tests} to test", "steps": steps, "batch": 64, "seeds": seeds}
    return Measurement(findings, setting=setting, notes=notes, peers={"table 1": "Szegedy et al. 2015"})


def block(c: int, widths: tuple[int, ...], *, reduced: bool, norm: Any = None) -> Any:
    """One block with the reductions, or the same wide kernels on the whole input and the pooled input as it is."""
    from volvelle.parts.convolution.inception import InceptionBlock

    n1, r3, n3, r5, n5, p = widths
    if not reduced:
        return InceptionBlock(c, n1, None, n3, None, n5, None, norm=norm)
    return InceptionBlock(c, n1, r3, n3, r5, n5, p, norm=norm)


def products(module: nn.Module, c: int, size: int) -> int:
    """Multiplications of one forward pass, counted as torch counts FLOPs, two each."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        module.to("meta")(torch.zeros(1, c, size, size))
    return counter.get_total_flops() // 2


def _counts() -> list[Finding]:
    """GoogLeNet's blocks; without reductions their input is also as wide as the naive blocks before made it."""
    printed, alone, chained = [], [], []
    naive_width = GOOGLENET["3a"][0]
    for name, (c, widths, size, millions) in GOOGLENET.items():
        ours = products(block(c, widths, reduced=True), c, size)
        naive = block(naive_width, widths, reduced=False)
        printed.append(abs(ours / 1e6 - millions) < 1 or name == "5a")
        alone.append(products(block(c, widths, reduced=False), c, size) / ours)
        chained.append(products(naive, naive_width, size) / ours)
        naive_width = naive.out_channels
    return [
        at_least("blocks whose multiplications are the table's, to the million (5a apart)", sum(printed), 9),
        at_least("block 3a, multiplications without reductions over with", alone[0], 2.0, "x"),
        at_least("the least of the nine", min(alone), 1.5, "x"),
        at_least("block 5b at the end of nine without reductions (the blow-up)", chained[-1], 10.0, "x"),
        Finding("width of the maps after nine blocks without reductions, 1024 with them", naive_width),
    ]


def network(reduced: bool, seed: int) -> nn.Sequential:
    """A stem, three blocks and a classifier."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    width = 32
    for number, widths in enumerate(SMALL):
        inception = block(width, widths, reduced=reduced, norm=nn.BatchNorm2d)
        layers.append(inception)
        width = inception.out_channels
        layers += [nn.MaxPool2d(2)] if number < 2 else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def accuracy(reduced: bool, data: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], steps: int, seed: int) -> float:
    """Train one network and return the percentage of test pictures it names."""
    import torch

    from volvelle.claims.garments import train

    (x, y), (others, labels) = data
    net = network(reduced, seed)
    train(net, lambda rows: torch.nn.functional.cross_entropy(net(x[rows]), y[rows]), len(x), steps, seed=seed)
    with torch.no_grad():
        found = torch.cat([net(part).argmax(1) for part in others.split(250)])
    return float((found == labels).float().mean() * 100)


def _accuracies(runs: dict[bool, list[float]], steps: int) -> list[Finding]:
    mean = {kind: statistics.mean(values) for kind, values in runs.items()}
    cost = products(network(False, 0), 1, 28) / products(network(True, 0), 1, 28)
    names = {True: "with reductions", False: "without"}
    return [
        at_least("small network: multiplications without over with", cost, 2.0, "x"),
        at_most("accuracy without reductions minus with", mean[False] - mean[True], LOSS, "points"),
        *(
            Finding(f"accuracy {names[kind]} after {steps} steps", mean[kind], "%", spread=(min(values), max(values)))
            for kind, values in runs.items()
        ),
    ]
