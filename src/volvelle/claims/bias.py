"""Bias: without one a perceptron's threshold stays at zero; before batch normalisation one does nothing."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CLAIM = Claim(
    title="Bias: what a threshold needs and a norm cancels",
    family="convolution",
    paper=Paper(
        "Ioffe & Szegedy",
        2015,
        "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
        "section 3.2; the perceptron: Rosenblatt 1958",
        "https://arxiv.org/abs/1502.03167",
    ),
    sentence="the bias b can be ignored since its effect will be canceled by the subsequent mean subtraction (the role "
    "of the bias is subsumed by β)",
    measured_by="perceptrons on separable points and on the brightness of garments, with and without a bias: errors "
    "left, and where the threshold lies; a convolution before BatchNorm in fp64: gradient of its bias, result when the "
    "bias moves, and weights after training with and without one; before GroupNorm as the control",
    summary="A bias lets a unit decide anywhere; before a norm that subtracts the mean it is without effect.",
    summary_zh="偏置让神经元的阈值可以移动；放在会减去均值的归一化之前，它不起任何作用。",
    seconds={"quick": 20, "full": 60},
    parts=(),
)


def measure(budget: Budget) -> Measurement:
    """Both halves (full: more points, and longer training)."""
    from volvelle.errors import VolvelleError

    points, steps = (200, 200) if budget == "quick" else (1000, 500)
    notes = [
        "in evaluation a bias is cancelled by the running mean, which starts at 0 and keeps 0.9 of the distance at "
        "each step: after 20 steps an eighth of the bias is left"
    ]
    findings = [*_perceptrons(points), *_before_a_norm(), *_training(steps)]
    try:
        findings[4:4] = _brightness()
    except VolvelleError as error:
        notes.append(f"the brightness of garments was not measured: {error}")
    setting = {"points": points, "epochs of the perceptron": EPOCHS, "training steps": steps, "dtype": "fp64"}
    return Measurement(findings, setting=setting, notes=notes, peers={"novikoff": "bound on the mistakes, 1962"})


EPOCHS = 400
THRESHOLD = 2.0


def perceptron(x: Tensor, y: Tensor, *, bias: bool, epochs: int = EPOCHS) -> tuple[Tensor, float, int]:
    """Rosenblatt's rule on points x (n, d) with y = ±1, until an epoch without mistakes: (w, b, errors left)."""
    import torch

    w, b, rows = [0.0] * x.shape[1], 0.0, list(zip(x.tolist(), y.tolist(), strict=True))
    for _ in range(epochs):
        mistakes = 0
        for point, label in rows:
            if label * (sum(map(operator.mul, w, point)) + b) <= 0:
                w = [weight + label * value for weight, value in zip(w, point, strict=True)]
                b, mistakes = b + label * bias, mistakes + 1
        if not mistakes:
            break
    weights = torch.tensor(w, dtype=x.dtype)
    return weights, b, int((y * (x @ weights + b) <= 0).sum())


def _perceptrons(points: int) -> list[Finding]:
    """NAND, and points on a line that are told apart at 2."""
    import torch

    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    nand = torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    gaps = torch.rand(points, generator=draw, dtype=torch.float64) + 0.1
    y = torch.ones(points, dtype=torch.float64)
    y[::2] = -1
    x = (THRESHOLD + y * gaps)[:, None]  # from 0.9 to 3.1, none within 0.1 of the threshold
    free = float(gaps[y > 0].min()), float(gaps[y < 0].min())
    w, b, wrong = perceptron(x, y, bias=True)
    alone, _, wrong_alone = perceptron(x, y, bias=False, epochs=20)
    return [
        at_most("NAND with a bias: errors left of 4", perceptron(corners, nand, bias=True)[2], 0),
        at_least("NAND without: errors left of 4", perceptron(corners, nand, bias=False)[2], 1),
        at_most(
            "points told apart at 2, with a bias: distance of the threshold -b / w", abs(-b / float(w) - 2), max(free)
        ),
        at_least("the same without: share of errors left (its threshold is 0 for every w)", wrong_alone / points, 0.5),
        Finding("errors left with the bias", wrong),
        Finding("weight without the bias", float(alone)),
    ]


def _brightness() -> list[Finding]:
    """Sandals against coats by mean brightness, one positive number for each: logistic units in fp64."""
    import torch

    from volvelle.claims.garments import garments

    (images, labels), _ = garments(6000, 0)
    chosen = [images[labels == label][:500].double().mean((1, 2, 3)) for label in (5, 4)]
    x, y = torch.cat(chosen), torch.cat([torch.full_like(part, k) for k, part in enumerate(chosen)])
    found = {}
    for bias in (True, False):
        w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        features = torch.stack((x, torch.full_like(x, float(bias))), dim=1)
        solver = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

        def loss(solver=solver, w=w, features=features) -> Tensor:
            solver.zero_grad()
            value = torch.nn.functional.binary_cross_entropy_with_logits(features @ w, y) + 1e-6 * w.square().sum()
            value.backward()
            return value

        solver.step(loss)
        found[bias] = float(((features @ w > 0) == (y > 0.5)).double().mean())
    return [
        at_least("sandals and coats by brightness, with a bias: share that is right", found[True], 0.9),
        at_most("the same without: all of one class, whatever the weight", abs(found[False] - 0.5), 0.0),
    ]


def _network(norm: nn.Module, *, bias: bool) -> nn.Sequential:
    import torch
    from torch import nn

    torch.manual_seed(0)
    head = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=True), norm, head)
    if not bias:
        net[0].register_parameter("bias", None)
    return net.double()


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    import torch

    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 3, 8, 8, generator=draw, dtype=torch.float64)
    return x, torch.randint(5, (16,), generator=draw)


def _loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    import torch

    return torch.nn.functional.cross_entropy(net(batch[0]), batch[1])


def _gradient(norm: nn.Module) -> tuple[float, float]:
    """Largest gradient of the bias over that of the weight, and how far the result moves when the bias does by 10."""
    import torch

    net, batch = _network(norm, bias=True), _batch(1)
    _loss(net, batch).backward()
    first: torch.nn.Conv2d = net[0]  # pyright: ignore[reportAssignmentType]
    assert first.bias is not None
    assert first.bias.grad is not None
    assert first.weight.grad is not None
    ratio = float(first.bias.grad.abs().max() / first.weight.grad.abs().max())
    with torch.no_grad():
        before = net(batch[0])
        first.bias += 10 * torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        return ratio, float((net(batch[0]) - before).abs().max())


def _before_a_norm() -> list[Finding]:
    from torch import nn

    gradient, moved = _gradient(nn.BatchNorm2d(8))
    other, other_moved = _gradient(nn.GroupNorm(2, 8))
    return [
        at_most("gradient of a bias before BatchNorm, over the weight's", gradient, 1e-13),
        at_most("change of the result when that bias moves by 10", moved, 1e-12),
        at_least("gradient of a bias before GroupNorm, over the weight's (must not be nothing)", other, 1e-3),
        at_least("change of its result when the bias moves (must not be nothing)", other_moved, 1e-2),
    ]


def _training(steps: int) -> list[Finding]:
    """The same steps with and without the bias lead to the same weights, and to the same answers in evaluation."""
    import torch
    from torch import nn

    nets = [_network(nn.BatchNorm2d(8), bias=bias) for bias in (True, False)]
    for net in nets:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for step in range(steps):
            optimizer.zero_grad()
            _loss(net, _batch(step)).backward()
            optimizer.step()
        net.eval()
    with_bias, without = (dict(net.named_parameters()) for net in nets)
    apart = max(float((with_bias[name] - without[name]).detach().abs().max()) for name in without)
    x = _batch(0)[0]
    with torch.no_grad():
        answers = float((nets[0](x) - nets[1](x)).abs().max())
    beta = float(without["1.bias"].detach().abs().max())
    return [
        at_most(f"largest difference of a weight after {steps} steps with and without the bias", apart, 1e-9),
        at_most("the same of an answer in evaluation, where the running mean holds the bias", answers, 1e-6),
        at_least("largest shift β of the norm after training (it takes the bias's role)", beta, 1e-3),
    ]
