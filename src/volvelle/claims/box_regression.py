"""Boxes that walk to their targets: what IoU, GIoU, DIoU and CIoU are worth as losses, without any network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

CLAIM = Claim(
    title="Overlap as a loss: IoU, GIoU, DIoU and CIoU",
    family="detection",
    paper=Paper(
        "Zheng et al.",
        2020,
        "Distance-IoU Loss: Faster and Better Learning for Bounding Box Regression",
        "section on the simulation experiment, figure 4; GIoU: Rezatofighi et al. 2019, section 3",
        "https://arxiv.org/abs/1911.08287",
    ),
    sentence="IoU and GIoU losses suffer from slow convergence and inaccurate regression; DIoU converges much faster, "
    "and with overlap, distance of the centres and proportions (CIoU) convergence is faster still",
    measured_by="the paper's simulation: anchors of 7 sizes and 7 proportions at points around 7 targets walk down "
    "each loss's gradient for 200 steps; error in centre and size, of all and of those that began without overlap; "
    "bounds and gradients of the four on random pairs",
    summary="IoU says nothing of boxes that do not touch; GIoU, DIoU and CIoU do, and boxes can follow them as losses.",
    summary_zh="两个框不相交时 IoU 没有梯度；GIoU、DIoU 与 CIoU 仍能给出方向，因此可以用作回归损失。",
    seconds={"quick": 60, "full": 300},
    parts=(
        "functional.box_iou",
        "functional.generalized_box_iou",
        "functional.distance_box_iou",
        "functional.complete_box_iou",
    ),
)

POINTS = {"quick": 10, "full": 100}
"""Places of anchors; the paper has 5,000."""
RADIUS, STEPS = 3.0, 200
RATIOS = (1 / 4, 1 / 3, 1 / 2, 1.0, 2.0, 3.0, 4.0)
SCALES = (0.5, 0.67, 0.75, 1.0, 1.33, 1.5, 2.0)
"""Areas of anchors; targets have area 1."""
LOSSES = ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou")
PUBLISHED = "DIoU, stepping as the authors' simulation"
NAMES = {**dict(zip(LOSSES, ("IoU", "GIoU", "DIoU", "CIoU"), strict=True)), PUBLISHED: PUBLISHED}


def measure(budget: Budget) -> Measurement:
    """10 places of anchors (full: 100)."""
    anchors, targets = cases(POINTS[budget])
    apart = _apart(anchors, targets)
    start = error(anchors, targets)
    findings = [
        Finding("error at the beginning", float(start.mean())),
        Finding("share of pairs that begin without overlap", float(apart.double().mean())),
    ]
    ends, halves = {}, {}
    for loss in NAMES:
        walked, means = walk(loss, anchors, targets)
        ends[loss] = error(walked, targets)
        halves[loss] = next((step for step, mean in enumerate(means) if mean <= float(start.mean()) / 10), STEPS)
        findings += [
            Finding(f"{NAMES[loss]}: error after {STEPS} steps", float(ends[loss].mean())),
            Finding(f"{NAMES[loss]}: the same of those that began without overlap", float(ends[loss][apart].mean())),
            Finding(f"{NAMES[loss]}: steps until a tenth of the error ({STEPS}: never)", halves[loss]),
        ]
    mean = {loss: float(found.mean()) for loss, found in ends.items()}
    stayed = float((ends["box_iou"] - start)[apart].abs().max())
    iou, giou, diou, ciou = LOSSES
    findings += [
        at_most("IoU: how far a box moved that began without overlap", stayed, 0),
        at_most("error left by GIoU over IoU", mean[giou] / mean[iou], 1.0, "x"),
        at_most("error left by DIoU over GIoU", mean[diou] / mean[giou], 1.0, "x"),
        at_most("error left by CIoU over DIoU", mean[ciou] / mean[diou], 1.0, "x"),
        at_most("steps of DIoU until a tenth of the error, over GIoU's", halves[diou] / halves[giou], 1.0, "x"),
        *_bounds(),
    ]
    setting = {
        "places": POINTS[budget],
        "pairs": len(anchors),
        "radius": RADIUS,
        "rate": "0.1, 0.01 after 160 steps, 0.001 after 180; times 2 - IoU",
        "dtype": "fp64",
    }
    notes = [
        "A box's width and height are kept above 0.001; the paper's simulation has 1.7 million pairs.",
        "Boxes follow the gradient of each formula. In the simulation that the authors published (dDIOU.m) the term of "
        "the diagonal has the other sign in x and y, which pushes boxes on instead of holding them back: the figures "
        "with that step are shown beside, and have no bound.",
    ]
    return Measurement(findings, setting=setting, notes=notes)


def cases(points: int) -> tuple[Tensor, Tensor]:
    """Anchors and targets as pairs, (k, 4) each: centre, width, height."""
    import torch

    draw = torch.Generator().manual_seed(0)
    angle, away = torch.rand(2, points, generator=draw, dtype=torch.float64)
    places = (
        RADIUS * away.sqrt()[:, None] * torch.stack(((2 * torch.pi * angle).cos(), (2 * torch.pi * angle).sin()), 1)
    )
    shapes = torch.tensor([[(s * r) ** 0.5, (s / r) ** 0.5] for s in SCALES for r in RATIOS], dtype=torch.float64)
    wanted = torch.tensor([[r**0.5, r**-0.5] for r in RATIOS], dtype=torch.float64)
    p, s, t = (
        i.flatten() for i in torch.meshgrid(*map(torch.arange, (points, len(shapes), len(wanted))), indexing="ij")
    )
    return torch.cat((places[p], shapes[s]), 1), torch.cat((torch.zeros(len(t), 2), wanted[t]), 1)


def walk(loss: str, anchors: Tensor, targets: Tensor) -> tuple[Tensor, list[float]]:
    """The boxes after the steps down 1 - similarity, and the mean error after each."""
    import torch

    boxes, means = anchors.clone(), []
    for step in range(STEPS):
        rate = 0.1 if step < 0.8 * STEPS else 0.01 if step < 0.9 * STEPS else 0.001
        uphill = _published(boxes, targets) if loss == PUBLISHED else _uphill(loss, boxes, targets)
        with torch.no_grad():
            faster = 2 - _similarity("box_iou", boxes, targets)
            boxes = boxes + rate * faster[:, None] * uphill
            boxes[:, 2:] = boxes[:, 2:].clamp(min=1e-3)
            means.append(float(error(boxes, targets).mean()))
    return boxes, means


def _uphill(loss: str, boxes: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the similarity for each box."""
    import torch

    leaf = boxes.clone().requires_grad_(True)
    return torch.autograd.grad(_similarity(loss, leaf, targets).sum(), leaf)[0]


def _published(boxes: Tensor, targets: Tensor) -> Tensor:
    """The gradient of DIoU, with the term of the diagonal, ρ² ∇c² / c⁴, subtracted in x and y where it is added."""
    import torch

    leaf = boxes.clone().requires_grad_(True)
    a, b = _corners(leaf), _corners(targets)
    sides = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    diagonal = sides.square().sum(1)
    (grown,) = torch.autograd.grad(diagonal.sum(), leaf)
    away = (boxes[:, :2] - targets[:, :2]).square().sum(1)
    uphill = _uphill("distance_box_iou", boxes, targets)
    uphill[:, :2] -= 2 * (away / diagonal.detach().square())[:, None] * grown[:, :2]
    return uphill


def error(boxes: Tensor, targets: Tensor) -> Tensor:
    """|x - x*| + |y - y*| + |w - w*| + |h - h*| of each pair."""
    return (boxes - targets).abs().sum(1).detach()


def _similarity(loss: str, boxes: Tensor, targets: Tensor) -> Tensor:
    from volvelle.parts.regions import iou

    return getattr(iou, loss)(_corners(boxes)[:, None], _corners(targets)[:, None])[:, 0, 0]


def _apart(boxes: Tensor, targets: Tensor) -> Tensor:
    """Whether the boxes of each pair do not touch."""
    gaps = (boxes[:, :2] - targets[:, :2]).abs() - (boxes[:, 2:] + targets[:, 2:]) / 2
    return (gaps > 0).any(1)


def _corners(boxes: Tensor) -> Tensor:
    import torch

    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return torch.cat((centre - half, centre + half), 1)


def _bounds() -> list[Finding]:
    """What the definitions promise, on random pairs: order, range, and a gradient where IoU has none."""
    import torch

    draw = torch.Generator().manual_seed(1)
    a, b = (torch.rand(4000, 4, generator=draw, dtype=torch.float64) * torch.tensor([4.0, 4, 1, 1]) for _ in "ab")
    values, apart = {loss: _similarity(loss, a, b) for loss in LOSSES}, _apart(a, b)
    above = max(float((values[loss] - values["box_iou"]).max()) for loss in LOSSES[1:])
    least = []
    for loss in LOSSES[1:]:
        leaf = a[apart].clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(_similarity(loss, leaf, b[apart]).sum(), leaf)
        least.append(float(gradient[:, :2].norm(dim=1).min()))
    return [
        at_most("GIoU, DIoU, CIoU minus IoU, largest", above, 1e-12),
        at_least("GIoU, least (not below -1)", float(values["generalized_box_iou"].min()), -1.0),
        at_least("pairs without overlap: least gradient of GIoU, DIoU and CIoU at the centre", min(least), 1e-6),
    ]
