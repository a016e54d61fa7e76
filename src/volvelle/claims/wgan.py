"""Wasserstein GAN: a distance that says how far, critics that follow it, and what they get wrong."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

    from volvelle.claims.gan_points import Played
    from volvelle.train.gan_objective import Game

CLAIM = Claim(
    title="Wasserstein GAN and certified distances",
    family="generation",
    paper=Paper(
        "Arjovsky, Chintala and Bottou",
        2017,
        "Wasserstein GAN",
        "example 1, theorem 2 and figures 3 and 4; with a gradient penalty: Gulrajani et al. 2017, figure 2; critics "
        "1-Lipschitz by construction: Anil et al. 2019, section 5.1",
        "https://arxiv.org/abs/1701.07875",
    ),
    sentence="W(P_0, P_θ) = |θ| ... provides meaningful loss metric that correlates with the generator's convergence "
    "and sample quality",
    measured_by="parallel lines at distance t by exact transport; gaps between plan and potentials, beside POT; a "
    "hundred critics of orthogonal layers, each trained on two random clouds, whose certified bound may not exceed the "
    "exact distance; what clipping and gradient penalties make of the same clouds (full: the critic's loss beside the "
    "exact distance while a generator learns, and 25 modes at equal steps and at equal time, five seeds)",
    summary="The critic estimates how far samples are from data and teaches where other losses saturate; exact "
    "transport and critics of known slope say how true the estimate is.",
    summary_zh="评论家估计样本与数据之间的距离，在其他损失饱和时仍能给出梯度；精确最优传输与已知斜率的评论家可检验该估计。",
    seconds={"quick": 60, "full": 900},
    parts=(
        "functional.gan_loss", "functional.gradient_penalty", "functional.clip_weights", "functional.wasserstein_1d",
        "functional.optimal_transport", "functional.sinkhorn", "functional.sliced_wasserstein",
        "functional.certified_w1", "nn.OrthogonalLinear", "nn.GroupSort",
    ),
    recipe="volvelle train gan data=PATH loss=wasserstein",
)  # fmt: skip

CASES, POINTS = 100, 256
DISTANCES = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0)
SEEDS, STEPS = 5, 1200


def measure(budget: Budget) -> Measurement:
    """Lines, duality, certificates and estimates (full: two games on a ring and on 25 modes)."""
    import torch

    full = budget == "full"
    findings = [*_linear(), *_duality(), *_certified(15), *_estimates(400, (0, 3, 5) if full else (0,))]
    notes: list[str] = []
    pictures: dict[str, str] = {}
    if full:
        tracked, chart = _tracked()
        findings += [*tracked, *_modes()]
        pictures["tracking"] = chart
        notes.append(
            "on the 25 modes the two games are reported, not judged: which covers more depends on rates and time"
        )
    setting = {"points of a cloud": POINTS, "random cases": CASES, "seeds": SEEDS, "torch": torch.__version__}
    return Measurement(findings, peers=_peers(), setting=setting, notes=notes, pictures=pictures)


def _peers() -> dict[str, str]:
    """Who else solves the transport here."""
    from importlib import metadata

    found = {"scipy (linear programming)": metadata.version("scipy")}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["POT"] = metadata.version("pot")
    return found


def _linear() -> list[Finding]:
    """W_1 of two lines at distance t is t."""
    import torch

    from volvelle.claims.gan import lines
    from volvelle.parts.transport.optimal_transport import wasserstein_distance

    torch.manual_seed(0)
    height = lines(0.0, POINTS)[0].double()
    off = [abs(float(wasserstein_distance(height, height + height.new_tensor([t, 0.0]))) - t) for t in DISTANCES]
    return [at_most("|W1 - t| of parallel lines at distance t = 0 to 4", max(off), 1e-12)]


def clouds(seed: int, n: int = POINTS, m: int = POINTS) -> tuple[Tensor, Tensor]:
    """Two random clouds in the plane: each a mixture of a few normal distributions."""
    import torch

    draw = torch.Generator().manual_seed(seed)

    def cloud(count: int) -> Tensor:
        modes = int(torch.randint(1, 5, (), generator=draw))
        centres, spread = 2 * torch.randn(modes, 2, generator=draw), 0.2 + torch.rand(modes, 1, generator=draw)
        chosen = torch.randint(modes, (count,), generator=draw)
        return centres[chosen] + spread[chosen] * torch.randn(count, 2, generator=draw)

    return cloud(n), cloud(m)


def _duality(count: int = 10) -> list[Finding]:
    """Gaps between plans and potentials, equal and unequal masses, and POT's costs where it is installed."""
    import torch

    from volvelle.parts.transport.cost import transport_cost
    from volvelle.parts.transport.optimal_transport import optimal_transport

    gaps, slack, beside = [], [], []
    try:
        import ot
    except ImportError:
        ot = None
    for seed in range(count):
        n, m = (POINTS, POINTS) if seed % 2 else (40, 55)
        x, y = (c.double() for c in clouds(seed, n, m))
        a, b = (torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for k in (n, m))
        masses = (None, None) if seed % 2 else (a / a.sum(), b / b.sum())
        M = transport_cost(x, y)
        found = optimal_transport(*masses, M)
        gaps.append(abs(found.gap))
        slack.append(float((found.plan * (M - found.u[:, None] - found.v)).sum()))
        if ot is not None:
            # A plan's sums are the masses it was asked for.
            p, q = (found.plan.sum(dim).numpy() for dim in (1, 0))
            beside.append(abs(float(ot.emd2(p, q, M.numpy())) - float(found.cost)))  # pyright: ignore[reportArgumentType]
    findings = [
        at_most(f"|primal - dual|, the worst of {count} transports", max(gaps), 1e-9),
        at_most("complementary slackness, Σ P (M - u - v), the worst", max(slack), 1e-9),
    ]
    if beside:
        findings.append(at_most("|cost - POT's|, the worst", max(beside), 1e-9))
    return findings


def _certified(steps: int) -> list[Finding]:
    """Bounds of a hundred critics trained for a moment: none above the exact distance."""
    from volvelle.claims.gan_points import estimate
    from volvelle.parts.transport.certified import certified_w1
    from volvelle.parts.transport.optimal_transport import wasserstein_distance

    shares = []
    for seed in range(CASES):
        x, y = clouds(seed, 64, 64)
        _, critic = estimate("orthogonal", x, y, steps=steps, seed=seed, width=32)
        shares.append(certified_w1(critic, x, y) / float(wasserstein_distance(x.double(), y.double())))
    spread = (min(shares), max(shares))
    return [
        at_most(f"certified bounds above the exact W1, of {CASES}", sum(share > 1 for share in shares), 0),
        Finding(f"certified over exact W1 after {steps} steps", statistics.median(shares), spread=spread),
    ]


def _estimates(steps: int, seeds: Sequence[int]) -> list[Finding]:
    """What four kinds of critic make of the same clouds, over the exact distance."""
    from volvelle.claims.gan_points import estimate
    from volvelle.parts.transport.certified import certified_w1
    from volvelle.parts.transport.optimal_transport import wasserstein_distance

    found: dict[str, list[float]] = {kind: [] for kind in ("orthogonal", "gradient", "one-sided", "clip")}
    for seed in seeds:
        x, y = clouds(seed)
        exact = float(wasserstein_distance(x.double(), y.double()))
        for kind, shares in found.items():
            said, critic = estimate(kind, x, y, steps=steps, seed=seed)
            shares.append((certified_w1(critic, x, y) if kind == "orthogonal" else said) / exact)
    least, many = min(found["orthogonal"]), f"{len(seeds)} pair{'s' if len(seeds) > 1 else ''} of clouds"
    findings = [at_least(f"certified over exact W1 after {steps} steps on {many}, the least", least, 0.98)]
    names = {"gradient": "a two-sided gradient penalty", "one-sided": "a one-sided one", "clip": "weight clipping"}
    for kind, name in names.items():
        shares = found[kind]
        spread = (min(shares), max(shares))
        findings.append(Finding(f"{name}: critic's estimate over exact W1", statistics.median(shares), spread=spread))
    return findings


def _games() -> dict[str, Game]:
    """The two games. Points of a plane are near each other: beside their distances a penalty of 10 is all there is."""
    from volvelle.train.gan_constraints import Slope
    from volvelle.train.gan_objective import Game

    return {"WGAN-GP": Game("wasserstein", Slope(weight=1.0), 5), "non-saturating GAN": Game("non-saturating")}


def _tracked() -> tuple[list[Finding], str]:
    """The critic's loss beside the exact distance while a generator learns a ring of eight modes."""
    from volvelle.claims.gan_points import correlation, play, ring
    from volvelle.train.charts import Series, line_chart

    found = {name: play(game, ring(), 600, seed=0, look_every=20) for name, game in _games().items()}
    values = {name: correlation(played.seen) for name, played in found.items()}
    curves = [
        Series(f"{name}: {what}", [(row["step"], row[key]) for row in played.seen])
        for name, played in list(found.items())[:1]
        for what, key in (("exact W1", "exact"), ("critic", "critic"))
    ]
    return [
        at_least("WGAN-GP: correlation of the critic's estimate with exact W1 in training", values["WGAN-GP"], 0.8),
        Finding("non-saturating GAN: the same of its scores", values["non-saturating GAN"]),
    ], line_chart(curves, y_label="W1")


def _modes() -> list[Finding]:
    """25 modes: as many steps, and as many seconds of the processor."""
    from volvelle.claims.gan_points import grid, play

    games, data = _games(), grid()
    wasserstein = [play(games["WGAN-GP"], data, STEPS, seed=seed) for seed in range(SEEDS)]
    plain = [play(games["non-saturating GAN"], data, STEPS, seed=seed) for seed in range(SEEDS)]
    ratio = statistics.median(w.seconds / p.seconds for w, p in zip(wasserstein, plain, strict=True))
    longer = [play(games["non-saturating GAN"], data, round(STEPS * ratio), seed=seed) for seed in range(SEEDS)]
    rows = {
        f"WGAN-GP, {STEPS} steps": wasserstein,
        f"non-saturating GAN, {STEPS} steps": plain,
        f"non-saturating GAN, {round(STEPS * ratio)} steps (equal time)": longer,
    }
    return [finding for name, played in rows.items() for finding in _covered(name, played)]


def _covered(name: str, played: Sequence[Played]) -> list[Finding]:
    """Modes found, samples near one, Fréchet distance of the points themselves: median and range over seeds."""
    import torch

    from volvelle.claims.gan_points import grid
    from volvelle.parts.metrics.frechet import feature_statistics, frechet_distance

    data = grid()
    real = feature_statistics(data.draw(2500, torch.Generator().manual_seed(7)))
    columns = {"modes of 25": [], "share of samples near a mode": [], "FD-points": []}
    for one in played:
        modes, near = data.covered(one.samples)
        distance = float(frechet_distance(*real, *feature_statistics(one.samples)))
        for values, value in zip(columns.values(), (modes, near, distance), strict=True):
            values.append(value)
    return [
        Finding(f"{name}: {what}", statistics.median(values), spread=(min(values), max(values)))
        for what, values in columns.items()
    ]
