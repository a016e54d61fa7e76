"""Generative adversarial networks: the best discriminator, the divergence it measures, and where both stop teaching."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor, nn

CLAIM = Claim(
    title="Generative adversarial networks",
    family="generation",
    paper=Paper(
        "Goodfellow et al.",
        2014,
        "Generative Adversarial Nets",
        "proposition 1 and theorem 1; where they stop teaching: Arjovsky & Bottou 2017, theorems 2.1 and 2.4",
        "https://arxiv.org/abs/1406.2661",
    ),
    sentence="For G fixed, the optimal discriminator D is p_data / (p_data + p_g) ... C(G) = -log(4) + 2 JSD(p_data ‖ "
    "p_g); early in learning, when G is poor, D can reject samples with high confidence ... log(1 - D(G(z))) saturates",
    measured_by="random densities in fp64, where the best discriminator is known, beside scipy's Jensen-Shannon "
    "distance; a network trained to tell two normal distributions apart beside the formula; parallel lines at distance "
    "t, whose divergence is log 2 for every t; the generator's gradients as the discriminator there becomes sure",
    summary="A generator and a discriminator play against each other: no likelihood is needed, and samples cost one "
    "forward pass.",
    summary_zh="生成器与判别器相互博弈：无需似然函数，采样只需一次前向计算。",
    seconds={"quick": 40, "full": 200},
    parts=("functional.gan_loss", "functional.r1_penalty", "nn.SpectralNorm"),
    recipe="volvelle train gan data=PATH",
)

DISTANCES = (0.25, 0.5, 1.0, 2.0)


def measure(budget: Budget) -> Measurement:
    """Densities, a trained discriminator, and lines that do not meet (full: more of each, and longer)."""
    import scipy
    import torch

    steps = 400 if budget == "quick" else 2000
    findings = [*_known_densities(20 if budget == "quick" else 200), *_learnt(steps), *_apart(steps)]
    return Measurement(
        findings,
        peers={"scipy.spatial.distance.jensenshannon": scipy.__version__},
        setting={"steps of each discriminator": steps, "torch": torch.__version__, "distances": list(DISTANCES)},
        pictures={"gradients": _drawing(steps)},
    )


def _known_densities(count: int) -> list[Finding]:
    """The value of the best discriminator is 2 JS - log 4, and no other discriminator is worth more to it."""
    import torch
    from scipy.spatial.distance import jensenshannon

    worst, better = 0.0, 0
    for seed in range(count):
        draw = torch.Generator().manual_seed(seed)
        p, q = torch.rand(2, 64, generator=draw, dtype=torch.float64).pow(3).clamp(min=1e-6)
        p, q = p / p.sum(), q / q.sum()
        best = (p / q).log()  # the score whose sigmoid is p / (p + q)
        value = _value(best, p, q)
        divergence = float(jensenshannon(p.numpy(), q.numpy())) ** 2
        worst = max(worst, abs(value - (2 * divergence - math.log(4))))
        for scale in (1e-3, 0.1, 1.0):
            other = best + scale * torch.randn(64, generator=draw, dtype=torch.float64)
            better += _value(other, p, q) > value
    return [
        at_most(f"|V(D*) - (2 JS - log 4)|, the worst of {count} pairs of densities", worst, 1e-12),
        at_most(f"other discriminators worth more, of {3 * count}", better, 0),
    ]


def _value(scores: Tensor, p: Tensor, q: Tensor) -> float:
    """V(D, G) = Σ p log D + q log(1 - D), from the loss of each point."""
    import torch

    from volvelle.parts.adversarial.losses import gan_loss

    each = [torch.vmap(lambda s, real=real: gan_loss(s, real))(scores[:, None]) for real in (True, False)]
    return -float(p @ each[0] + q @ each[1])


def _learnt(steps: int) -> list[Finding]:
    """A network told only samples of N(0, 1) and N(1, 1) ends at the formula's probabilities and divergence."""
    import torch

    from volvelle.claims.gan_points import perceptron
    from volvelle.parts.adversarial.losses import gan_loss

    torch.manual_seed(0)
    net = perceptron(1, 1, 32, 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = torch.randn(4096, 1), 1 + torch.randn(4096, 1)
        (gan_loss(net(x), True) + gan_loss(net(y), False)).backward()
        optimizer.step()
        decay.step()
    # By quadrature: log p / q of these two is 1/2 - x.
    at = torch.linspace(-8, 9, 20_001, dtype=torch.float64)
    p, q = ((-((at - mean) ** 2) / 2).exp() / math.sqrt(2 * math.pi) for mean in (0, 1))
    best = 0.5 - at
    with torch.no_grad():
        found = net(at[:, None].float())[:, 0].double()
    width = float(at[1] - at[0])
    off = float(((found.sigmoid() - best.sigmoid()).abs() * (p + q) / 2).sum()) * width
    log = torch.nn.functional.logsigmoid
    said, true = (float((p * log(s) + q * log(-s)).sum()) * width / 2 + math.log(2) for s in (found, best))
    return [
        at_most("mean |D - p / (p + q)| of a network trained on samples of two normal distributions", off, 0.02),
        at_most("its Jensen-Shannon divergence over the true one, less 1", abs(said / true - 1), 0.05),
    ]


def lines(t: float, count: int) -> tuple[Tensor, Tensor]:
    """Points on the line x = 0 and, as many, on x = t (Arjovsky et al. 2017, example 1)."""
    import torch

    height = torch.rand(2, count, 1)
    zero = torch.zeros(count, 1)
    return torch.cat((zero, height[0]), 1), torch.cat((zero + t, height[1]), 1)


def _apart(steps: int) -> list[Finding]:
    """At every distance the divergence is log 2, and a sure discriminator teaches a minimax generator nothing."""
    divergences, kept = [], []
    for t in DISTANCES:
        rows = discriminated(t, steps)
        last = rows[-1]
        divergences.append(last["js"])
        peak = max(row["minimax"] for row in rows)
        kept.append((last["minimax"] / peak, last["minimax"] / last["non-saturating"], last["non-saturating"]))
    short = math.log(2) - min(divergences)
    left, beside, other = max(k[0] for k in kept), max(k[1] for k in kept), min(k[2] for k in kept)
    return [
        at_most("log 2 less the divergence that a discriminator finds, worst distance", short, 0.01),
        at_most("its spread over distances 0.25 to 2", max(divergences) - min(divergences), 0.01),
        at_most("minimax gradient of the generator at the end over its peak, largest", left, 0.05),
        at_most("the same over the non-saturating gradient, largest", beside, 0.01),
        at_least("non-saturating gradient of the generator at the end, smallest", other, 0.5),
    ]


def discriminated(t: float, steps: int) -> list[dict[str, float]]:
    """What a discriminator of two lines at distance t says of them while it learns, and the gradients with respect to
    t.

    Rows: step, js (the divergence it finds), and the generator's loss's slope in t for two games.
    """
    import torch

    from volvelle.claims.gan_points import perceptron
    from volvelle.parts.adversarial.losses import gan_loss

    torch.manual_seed(0)
    net, rows = perceptron(2, 1, 64, 2), []
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for step in range(steps + 1):
        x, y = lines(t, 512)
        loss = gan_loss(net(x), True) + gan_loss(net(y), False)
        if step % (steps // 10) == 0:
            rows.append({"step": step, "js": math.log(2) - float(loss.detach()) / 2, **_slopes(net, t)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return rows


def _slopes(net: nn.Module, t: float) -> dict[str, float]:
    """The size of the slope in t of the generator's loss, averaged over the line, for two games."""
    import torch

    from volvelle.parts.adversarial.losses import gan_loss

    found = {}
    for kind in ("minimax", "non-saturating"):
        y = lines(t, 512)[1].requires_grad_()
        value = gan_loss(net(y), True, kind, for_="generator")
        slope = torch.autograd.grad(value, y)[0][:, 0].sum()
        found[kind] = abs(float(slope))
    return found


def _drawing(steps: int) -> str:
    """Both games' gradients while the discriminator learns."""
    from volvelle.train.charts import Series, line_chart

    rows = discriminated(1.0, steps)
    series = [
        Series(kind, [(row["step"], max(row[kind], 1e-12)) for row in rows], dots=True)
        for kind in ("minimax", "non-saturating")
    ]
    return line_chart(series, x_label="discriminator steps", y_label="generator's gradient", log_y=True)
