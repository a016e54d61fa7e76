"""Dilated convolutions: a field that grows exponentially for the same parameters, and the holes rates can leave."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor, nn

CLAIM = Claim(
    title="Dilated convolution, gridding and hybrid rates",
    family="convolution",
    paper=Paper(
        "Yu & Koltun",
        2016,
        "Multi-Scale Context Aggregation by Dilated Convolutions",
        "section 2; gridding: Wang et al. 2018, section 3.2",
        "https://arxiv.org/abs/1511.07122",
    ),
    sentence="dilated convolutions support exponential expansion of the receptive field without loss of resolution or "
    "coverage: the field of each element of F_(i+1) is (2^(i+2) - 1)², the parameters of each layer are identical",
    measured_by="inputs that reach one output, by the gradient of layers with positive weights: the field against the "
    "formula, weights against undilated layers and one dense kernel of the same field; with equal and with hybrid "
    "rates (full: both trained on garments, a class for each pixel, three seeds)",
    summary="Spread-out taps see far at full resolution; rates that share a factor leave a grid of unseen pixels, "
    "hybrid ones do not.",
    summary_zh="空洞卷积不降分辨率即可扩大感受野；有公因子的膨胀率会留下网格状盲区，混合膨胀率则不会。",
    seconds={"quick": 20, "full": 900},
    parts=("functional.atrous_conv2d", "functional.hybrid_dilation_rates", "functional.gridding", "nn.AtrousConv2d"),
)

DOUBLING = (1, 2, 4, 8)
PAIRS = ((2, 2, 2), (4, 4, 4))
"""Equal rates that hybrid ones of the same field are compared with."""
WIDTH = 16


def measure(budget: Budget) -> Measurement:
    """Fields, weights and holes (full: a network with equal and one with hybrid rates)."""
    from volvelle.claims.garments import unless_missing
    from volvelle.parts.convolution.hybrid_dilation import hybrid_dilation_rates

    hybrids = {rates: hybrid_dilation_rates(3, field=1 + 2 * sum(rates)) for rates in PAIRS}
    findings, notes = [*_expansion(), *_holes(hybrids)], []
    setting: dict[str, object] = {"kernel": 3, "rates": [list(r) for r in (DOUBLING, *PAIRS, *hybrids.values())]}
    if budget == "full":
        with unless_missing(notes):
            findings += _trained(PAIRS[-1], hybrids[PAIRS[-1]])
            setting |= {"data": "Fashion-MNIST, four garments in noise, 56 x 56", "steps": STEPS, "seeds": SEEDS}
    drawn = {f"rates {', '.join(map(str, rates))}": paths(rates) for pair in hybrids.items() for rates in pair}
    return Measurement(
        findings,
        setting=setting,
        notes=notes,
        peers={"formula": "Yu & Koltun 2016, section 2"},
        pictures={"gridding": drawing(drawn)},
    )


def stack(rates: Sequence[int], width: int = 1) -> nn.Sequential:
    """Layers of 3 x 3 with these rates."""
    from torch import nn

    from volvelle.parts.convolution.atrous import AtrousConv2d

    return nn.Sequential(*(AtrousConv2d(width, width, 3, dilation=r, bias=False) for r in rates))


def paths(rates: Sequence[int]) -> Tensor:
    """How many paths lead from each input of the square field to an output: gradients of layers of ones, int64."""
    import torch

    net, side = stack(rates).double(), 1 + 2 * sum(rates)
    for parameter in net.parameters():
        torch.nn.init.ones_(parameter)
    x = torch.zeros(1, 1, side + 2, side + 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(x)[0, 0, side // 2 + 1, side // 2 + 1], x)
    return gradient[0, 0, 1:-1, 1:-1].round().long()


def _expansion() -> list[Finding]:
    """Fields (2^(i+2) - 1)² of rates 1, 2, 4, .., without holes, and the weights of what sees as much undilated."""
    off, coverage = 0, 1.0
    for layers in range(1, len(DOUBLING) + 1):
        found = paths(DOUBLING[:layers])
        off = max(off, abs(int((found > 0).sum()) - (2 ** (layers + 1) - 1) ** 2))
        coverage = min(coverage, float((found > 0).double().mean()))
    side = 1 + 2 * sum(DOUBLING)
    weights = [sum(p.numel() for p in layer.parameters()) for layer in stack(DOUBLING, WIDTH)]
    undilated = sum(p.numel() for p in stack((1,) * (side // 2), WIDTH).parameters()) / sum(weights)
    dense = side**2 * WIDTH**2 / sum(weights)
    return [
        at_most("inputs seen, less (2^(i+2) - 1)², after each of four layers", off, 0),
        at_least("share of the square field that is seen", coverage, 1.0),
        at_most("weights of a layer of rate 8 less those of rate 1", weights[-1] - weights[0], 0),
        at_least(f"weights of undilated layers of the same field, {side} x {side}, over dilated", undilated, 3.0, "x"),
        at_least("weights of one dense kernel of this field over dilated", dense, 25.0, "x"),
    ]


def _holes(hybrids: dict[tuple[int, ...], tuple[int, ...]]) -> list[Finding]:
    """Coverage by gradients for equal and hybrid rates, and whether the count without gradients says the same."""
    from volvelle.parts.convolution.gridding import gridding

    findings, wrong = [], 0
    for equal, hybrid in hybrids.items():
        seen = {rates: paths(rates) for rates in (equal, hybrid)}
        for rates, found in seen.items():
            middle = gridding(rates).paths
            wrong += sum(
                int(found[y, x]) != middle[y] * middle[x] for y in range(len(middle)) for x in range(len(middle))
            )
        share = {rates: float((found > 0).double().mean()) for rates, found in seen.items()}
        names = {rates: ", ".join(map(str, rates)) for rates in seen}
        side = len(seen[equal])
        findings += [
            at_most(f"share of the {side} x {side} field that rates {names[equal]} see", share[equal], 0.5),
            at_least(f"the same of rates {names[hybrid]}, equal weights and field", share[hybrid], 1.0),
        ]
    findings.append(at_most("inputs for which `gridding` counts other paths than the gradient", wrong, 0))
    return findings


STEPS, SEEDS = 300, 3


def _trained(equal: tuple[int, ...], hybrid: tuple[int, ...]) -> list[Finding]:
    """Mean IoU of small networks that name each pixel's garment."""
    from volvelle.claims.garments import garments, scenes, two_threads

    (images, labels), (others, their_labels) = garments(20000, 2000)
    with two_threads():
        held = scenes(others, their_labels, 300, seed=0)
        runs = {
            rates: [iou(rates, (images, labels), held, STEPS, seed) for seed in range(SEEDS)]
            for rates in (equal, hybrid)
        }
    mean = {rates: statistics.mean(values) for rates, values in runs.items()}
    return [
        at_least("mean IoU of hybrid rates minus equal ones", mean[hybrid] - mean[equal], 0.0, "points"),
        *(
            Finding(f"mean IoU, rates {', '.join(map(str, rates))}", mean[rates], "%", spread=(min(v), max(v)))
            for rates, v in runs.items()
        ),
    ]


def iou(rates: Sequence[int], data: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], steps: int, seed: int) -> float:
    """Train one network with these rates and return its mean IoU in percent."""
    import torch
    from torch import nn

    from volvelle.claims.garments import PIXEL_CLASSES, learn_scenes, named_pixels
    from volvelle.parts.convolution.atrous import AtrousConv2d
    from volvelle.parts.metrics.confusion import confusion_matrix
    from volvelle.parts.metrics.overlap import mean_iou

    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(1, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    for r in rates:
        layers += [AtrousConv2d(WIDTH, WIDTH, 3, dilation=r, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Conv2d(WIDTH, PIXEL_CLASSES, 1))
    learn_scenes(net, data, steps, seed)
    matrix = confusion_matrix(named_pixels(net, held[0]), held[1], PIXEL_CLASSES)
    return float(mean_iou(matrix) * 100)


def drawing(maps: dict[str, Tensor], cell: int = 8) -> str:
    """Squares for the inputs of each field, darker the more paths; what is never seen stays empty. An SVG."""
    columns, gap, top = len(maps), 24, 28
    side = max(len(found) for found in maps.values()) * cell
    width, height = columns * (side + gap) + gap, side + top + gap
    squares = []
    for column, (title, found) in enumerate(maps.items()):
        left, room = gap + column * (side + gap), (side - len(found) * cell) // 2
        squares.append(f'<text x="{left}" y="18" font-size="13">{title}</text>')
        squares.append(
            f'<rect x="{left + room}" y="{top + room}" width="{len(found) * cell}" height="{len(found) * cell}" '
            'fill="#ffffff" stroke="#999999"/>'
        )
        shades = (found / found.max()).sqrt().tolist()
        for y, row in enumerate(shades):
            squares += [
                f'<rect x="{left + room + x * cell}" y="{top + room + y * cell}" width="{cell}" height="{cell}" '
                f'fill="#20558a" fill-opacity="{max(shade, 0.08):.2f}"/>'
                for x, shade in enumerate(row)
                if shade
            ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">'
        f'<rect width="{width}" height="{height}" fill="#f7f7f7"/>{"".join(squares)}</svg>'
    )
