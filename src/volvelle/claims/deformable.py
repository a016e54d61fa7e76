"""Deformable convolution: against atrous convolution of equal cost on turned and scaled objects; where its taps go."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least

if TYPE_CHECKING:
    from torch import Tensor, nn

CLAIM = Claim(
    title="Deformable convolution",
    family="convolution",
    paper=Paper(
        "Dai et al.",
        2017,
        "Deformable Convolutional Networks",
        "section 1; section 2.1; table 2 (effective dilation) and tables 1 and 3",
        "https://arxiv.org/abs/1703.06211",
    ),
    sentence="to model geometric transformations there are two ways: training data with sufficient variations, usually "
    "by augmentation such as affine transformation, and transformation-invariant features; deformable convolution "
    "learns its offsets from the task; receptive field sizes are adaptive to objects' sizes",
    measured_by="networks alike but for three layers, atrous or deformable, the atrous one widened until it costs as "
    "much; Fashion-MNIST garments turned by up to 60 degrees and scaled 1 to 3, none of them trained on: objects found "
    "with the right class and a box that overlaps enough, after training on one view of each garment and on ever new "
    "ones; distances between the taps at the middle of small and large objects (quick: one seed, one view)",
    summary="A convolution that moves its taps by offsets which it predicts: the grid follows the object.",
    summary_zh="卷积核的采样点按预测的偏移量移动，采样网格随物体的形状与大小而变。",
    seconds={"quick": 60, "full": 900},
    parts=("functional.deform_conv2d", "nn.DeformConv2d"),
    recipe="volvelle train detect data=FOLDER deformable=3",
)

SIDE, STRIDE = 48, 4
SCALES = (0.5, 1.5)
"""Of the garments' 28 pixels."""
ANGLE = 60.0
WIDTH, LAYERS = 32, 3
LOOSE, STRICT = 0.5, 0.8
"""Least overlap of a box that counts."""


def measure(budget: Budget) -> Measurement:
    """Train both kinds with one view of every garment and with ever new views (full), and look at the offsets."""
    from volvelle.claims.garments import garments, two_threads
    from volvelle.errors import VolvelleError

    seeds, steps, rows, tests = (1, 120, 2000, 500) if budget == "quick" else (3, 350, 6000, 2000)
    try:
        training, others = garments(rows, tests)
    except VolvelleError as error:
        return Measurement(unmeasurable=f"Fashion-MNIST cannot be had: {error}")
    wide = equal_width()
    runs: dict[tuple[str, str], list[Found]] = {}
    with two_threads():
        for views in ("one view",) if budget == "quick" else ("one view", "new views"):
            for kind in ("atrous", "deformable"):
                for seed in range(seeds):
                    runs.setdefault((kind, views), []).append(run(kind, views, training, others, steps, seed))
    setting = {
        "data": f"Fashion-MNIST on {SIDE} x {SIDE} pixels, {rows} to train, {tests} to test, scaled {SCALES[0]} to "
        f"{SCALES[1]}, turned by up to {ANGLE:g} degrees",
        "steps": steps, "batch": 64, "seeds": seeds, "width deformable, atrous": [WIDTH, wide],
        "million products, atrous and deformable": [round(cost("atrous", wide) / 1e6, 2),
                                                    round(cost("deformable", WIDTH) / 1e6, 2)],
        "dtype": "fp32",
    }  # fmt: skip
    return Measurement(findings(runs), setting=setting, peers={"network": "the same with atrous convolution"})


@dataclass(frozen=True)
class Found:
    """Of one trained network: shares of test objects found in percent, and the taps' distances by object size."""

    loose: float
    strict: float
    small: float
    large: float


def findings(runs: dict[tuple[str, str], list[Found]]) -> list[Finding]:
    """What the runs say of the paper's sentences."""

    def mean(kind: str, views: str, what: str) -> float:
        return statistics.mean(getattr(one, what) for one in runs[kind, views])

    every = sorted({views for _, views in runs}, reverse=True)
    found = []
    for views in every:
        gain = {w: mean("deformable", views, w) - mean("atrous", views, w) for w in ("loose", "strict")}
        found.append(at_least(f"{views}: found at IoU {STRICT}, gained by deformable", gain["strict"], 0.0, "points"))
        more = gain["strict"] - gain["loose"]
        found.append(at_least(f"{views}: that gain less the one at IoU {LOOSE}", more, 0.0, "points"))
        grown = mean("deformable", views, "large") / mean("deformable", views, "small")
        found.append(at_least(f"{views}: distance of taps, largest over smallest objects", grown, 1.05, "x"))
    if len(every) > 1:
        new, one = every[0], every[1]
        gained = mean("atrous", new, "strict") - mean("atrous", one, "strict")
        found.append(Finding(f"the other way: atrous gains by new views at IoU {STRICT}", gained, "points"))
    for (kind, views), each in runs.items():
        for what, overlap in (("loose", LOOSE), ("strict", STRICT)):
            values = [getattr(one, what) for one in each]
            spread = (min(values), max(values))
            found.append(Finding(f"{kind}, {views}: found at IoU {overlap}", statistics.mean(values), "%", spread))
    return found


def network(kind: str, width: int, seed: int) -> nn.Module:
    """An encoder of stride 4, three layers of that kind with dilation 2, and a head that points at one object."""
    import torch
    from torch import nn

    from volvelle.systems.detection.deforming import DeformedConv2d

    def layer() -> nn.Module:
        plain = nn.Conv2d(width, width, 3, padding=2, dilation=2, bias=False)
        return plain if kind == "atrous" else DeformedConv2d(plain)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            ends = (1, width // 2), (width // 2, width)
            self.stem = nn.Sequential(
                *(
                    part
                    for a, b in ends
                    for part in (nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                )
            )
            self.layers = nn.ModuleList(layer() for _ in range(LAYERS))
            self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(LAYERS))
            self.head = nn.Conv2d(width, 10 + 1 + 4, 1)  # classes, where to look, distances to the box's sides

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.stem(x)
            for one, norm in zip(self.layers, self.norms, strict=True):
                x = (x + norm(one(x))).relu()
            out = self.head(x).flatten(2)  # (b, 15, cells)
            look = out[:, 10].softmax(-1).unsqueeze(1)
            steps = (torch.arange(SIDE // STRIDE) + 0.5) * STRIDE
            y, x = (one.flatten() for one in torch.meshgrid(steps, steps, indexing="ij"))
            far = out[:, 11:].exp() * STRIDE
            boxes = torch.stack((x - far[:, 0], y - far[:, 1], x + far[:, 2], y + far[:, 3]), 1)
            return (out[:, :10] * look).sum(-1), (boxes * look).sum(-1)

    torch.manual_seed(seed)
    return Network()


def cost(kind: str, width: int) -> int:
    """Multiply-accumulates on one picture; reading a tap between pixels counts as its four."""
    import torch

    from volvelle.claims.detect_scenes import counted

    cells = (SIDE // STRIDE) ** 2
    net = network("atrous", width, 0).eval()
    total = counted(net, lambda: net(torch.zeros(1, 1, SIDE, SIDE)))
    if kind == "atrous":
        return total
    return total + LAYERS * cells * 9 * width * (18 + 4)  # the predictors of the offsets, and the reads


def equal_width() -> int:
    """The least width of the atrous network, even, that costs as much as the deformable one."""
    wanted, width = cost("deformable", WIDTH), WIDTH
    while cost("atrous", width) < wanted:
        width += 2
    return width


def views(images: Tensor, draw: object) -> tuple[Tensor, Tensor, Tensor]:
    """Each picture (n, 1, 28, 28) turned, scaled and moved on a larger ground: pictures, boxes (n, 4), scales (n)."""
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    n = len(images)
    one, two, three, four = torch.rand(4, n, generator=draw)  # pyright: ignore[reportArgumentType, reportCallIssue]
    scale = SCALES[0] * (SCALES[1] / SCALES[0]) ** one
    angle = (2 * two - 1) * ANGLE * torch.pi / 180
    # Where the middle may lie: what is left of the ground when the garment's circle of half its side stays inside.
    free = (1 - scale * 28 / SIDE).clamp(min=0)
    middle = torch.stack(((2 * three - 1) * free, (2 * four - 1) * free), -1)
    shrink = SIDE / 28 / scale
    cos, sin = angle.cos() * shrink, angle.sin() * shrink
    turn = torch.stack((torch.stack((cos, sin), -1), torch.stack((-sin, cos), -1)), 1)
    theta = torch.cat((turn, -turn @ middle.unsqueeze(-1)), -1)
    out = grid_sample(images, affine_grid(theta, [n, 1, SIDE, SIDE], align_corners=False), align_corners=False)
    seen = out[:, 0] > 0.1
    boxes = torch.stack((*_span(seen.any(1)), *_span(seen.any(2))), -1)[:, [0, 2, 1, 3]]
    return out, boxes, scale


def _span(line: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row of truths (n, side) begins and ends; the whole line where nothing is seen."""
    whole = line | ~line.any(-1, keepdim=True)
    first = whole.int().argmax(-1).float()
    return first, line.shape[-1] - whole.flip(-1).int().argmax(-1).float()


def run(
    kind: str, which: str, training: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], steps: int, seed: int
) -> Found:
    """Train one network and measure it on objects it has not seen."""
    import torch
    from torch.nn.functional import cross_entropy

    from volvelle.claims.garments import train
    from volvelle.parts.regions.iou import generalized_box_iou

    images, labels = training
    net = network(kind, WIDTH if kind == "deformable" else equal_width(), seed)
    fixed, fixed_boxes, _ = views(images, torch.Generator().manual_seed(seed + 100))
    draw = torch.Generator().manual_seed(seed + 200)

    def loss(rows: Tensor) -> Tensor:
        if which == "one view":
            pictures, boxes = fixed[rows], fixed_boxes[rows]
        else:
            pictures, boxes, _ = views(images[rows], draw)
        scores, said = net(pictures)
        overlap = generalized_box_iou(said, boxes).diagonal()
        return cross_entropy(scores, labels[rows].long()) + (1 - overlap).mean()

    train(net, loss, len(images), steps, seed=seed)
    return look(net, kind, *others)


def look(net: nn.Module, kind: str, images: Tensor, labels: Tensor) -> Found:
    """Shares of objects found, and distances of the taps over the smallest and the largest fifth of the objects."""
    import torch

    from volvelle.parts.regions.iou import box_iou

    pictures, boxes, scale = views(images, torch.Generator().manual_seed(7))
    overlaps, right, apart = [], [], []
    with torch.no_grad():
        for part in torch.arange(len(images)).split(250):
            scores, said = net(pictures[part])
            overlaps.append(box_iou(said, boxes[part]).diagonal())
            right.append(scores.argmax(-1) == labels[part])
            if kind == "deformable":
                apart.append(effective_dilation(net, pictures[part], boxes[part]))
    overlap, hit = torch.cat(overlaps), torch.cat(right)
    loose, strict = (100 * float((hit & (overlap >= least)).float().mean()) for least in (LOOSE, STRICT))
    if not apart:
        return Found(loose, strict, 2.0, 2.0)  # the dilation of every tap
    order, far = scale.argsort(), torch.cat(apart)
    fifth = max(1, len(order) // 5)
    return Found(loose, strict, float(far[order[:fifth]].mean()), float(far[order[-fifth:]].mean()))


def effective_dilation(net: nn.Module, pictures: Tensor, boxes: Tensor) -> Tensor:
    """The paper's measure for each picture: mean distance of neighbouring taps of the filter at the object's middle,
    in cells, over the deformable layers.
    """
    import torch

    heard: list[Tensor] = []
    hooks = [layer.offset.register_forward_hook(lambda *args: heard.append(args[-1])) for layer in net.layers]  # type: ignore[union-attr]
    try:
        net(pictures)
    finally:
        for hook in hooks:
            hook.remove()
    rows = torch.arange(len(pictures))
    middle = ((boxes[:, :2] + boxes[:, 2:]) / 2 / STRIDE).long().clamp(0, SIDE // STRIDE - 1)
    grid = torch.stack(torch.meshgrid(*[torch.tensor([-2.0, 0.0, 2.0])] * 2, indexing="ij"), -1)  # (3, 3, y x)
    distances = []
    for offset in heard:
        taps = grid + offset[rows, :, middle[:, 1], middle[:, 0]].view(-1, 3, 3, 2)
        down, along = taps.diff(dim=1).norm(dim=-1), taps.diff(dim=2).norm(dim=-1)
        distances.append(torch.cat((down.flatten(1), along.flatten(1)), 1).mean(1))
    return torch.stack(distances).mean(0)
