"""Games on points in the plane, for the claims on adversarial training: what is to be learnt, networks, one
training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from volvelle.train.gan_objective import Game

BATCH = 256


@dataclass(frozen=True)
class Mixture:
    """Equal normal distributions of deviation `spread` around `centres` (k, 2)."""

    centres: Tensor
    spread: float

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Points (count, 2)."""
        import torch

        chosen = torch.randint(len(self.centres), (count,), generator=generator)
        return self.centres[chosen] + self.spread * torch.randn(count, 2, generator=generator)

    def covered(self, points: Tensor, share: float = 0.2) -> tuple[int, float]:
        """Modes that have at least `share` of the points they should have, and the share of points near any mode.

        Near is within four deviations.
        """
        import torch

        distance = torch.cdist(points, self.centres)
        least, nearest = distance.min(1)
        near = least <= 4 * self.spread
        counts = torch.bincount(nearest[near], minlength=len(self.centres))
        wanted = share * len(points) / len(self.centres)
        return int((counts >= wanted).sum()), float(near.float().mean())


def ring(modes: int = 8) -> Mixture:
    """Modes on a circle of radius 2."""
    import torch

    angles = torch.arange(modes) * (2 * math.pi / modes)
    return Mixture(2 * torch.stack((angles.cos(), angles.sin()), 1), 0.05)


def grid(side: int = 5) -> Mixture:
    """Side x side modes, at distance 1: the 25 Gaussians of Gulrajani et al. 2017, figure 2, up to scale."""
    import torch

    steps = torch.arange(side) - (side - 1) / 2
    return Mixture(torch.cartesian_prod(steps, steps), 0.05)


def perceptron(inputs: int, outputs: int, width: int = 128, depth: int = 3) -> nn.Sequential:
    """Linear layers with ReLU between."""
    from torch import nn

    sizes = [inputs, *[width] * depth]
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


@dataclass(frozen=True)
class Played:
    """What came of a game: samples (n, 2), the CPU seconds it took, and what was seen on the way."""

    samples: Tensor
    seconds: float
    seen: list[dict[str, float]]


def play(
    game: Game,
    data: Mixture,
    steps: int,
    *,
    seed: int,
    look_every: int | None = None,
    rate: float = 1e-3,
    latent: int = 4,
    samples: int = 2500,
) -> Played:
    """Train a generator of points by the engine's loop; `look_every` steps compare critic and exact distance."""
    import torch

    from volvelle.data.loader import Loader
    from volvelle.train.gan_objective import GANObjective
    from volvelle.train.loop import fit
    from volvelle.train.observer import Quiet
    from volvelle.train.options import FitOptions

    torch.manual_seed(seed)
    generator, critic, seen = perceptron(latent, 2), perceptron(2, 1), []
    adam = lambda weights: torch.optim.Adam(weights.values(), lr=rate, betas=(0.5, 0.9))  # noqa: E731
    objective = GANObjective(
        generator,
        critic,
        game,
        optimizers=(adam, adam),
        latents=lambda count: torch.randn(count, latent),
        real=lambda batch: data.draw(BATCH),
        look=_looker(generator, critic, data, latent, seen) if look_every else None,
    )
    began = time.process_time()
    nothing: Any = Loader([0], 1, seed=0, collate=list)
    fit(objective, nothing, options=FitOptions(steps=steps, seed=seed, evaluate_every=look_every), observer=Quiet())
    seconds = time.process_time() - began
    with torch.no_grad():
        found = generator(torch.randn(samples, latent, generator=torch.Generator().manual_seed(1)))
    return Played(found, seconds, seen)


def _looker(
    generator: nn.Module, critic: nn.Module, data: Mixture, latent: int, seen: list[dict[str, float]]
) -> Callable[[int], dict[str, float]]:
    """What the critic says of fresh points, beside the exact distance of the same points."""
    import torch

    from volvelle.parts.transport.optimal_transport import wasserstein_distance

    def look(step: int) -> dict[str, float]:
        x, y = data.draw(BATCH), generator(torch.randn(BATCH, latent))
        says = float(critic(x).mean() - critic(y).mean())
        seen.append({"step": step, "exact": float(wasserstein_distance(x, y)), "critic": says})
        return {}

    return look


def correlation(seen: list[dict[str, float]]) -> float:
    """Pearson's correlation of what the critic says with the exact distance, from the second look on."""
    import torch

    pairs = torch.tensor([[row["exact"], row["critic"]] for row in seen[1:]], dtype=torch.float64)
    return float(torch.corrcoef(pairs.T)[0, 1])


def estimate(kind: str, x: Tensor, y: Tensor, *, steps: int, seed: int = 0, width: int = 64) -> tuple[float, nn.Module]:
    """What a critic trained on these two clouds says of their distance, and the critic.

    `kind`: "orthogonal" (1-Lipschitz by construction), "gradient", "one-sided" or "clip" (a plain network, held in
    training).
    """
    import torch

    from volvelle.parts.adversarial.losses import gan_loss
    from volvelle.systems.generation.gan import LipschitzCritic
    from volvelle.train.gan_constraints import Clipped, Constraint, Slope

    constraints: dict[str, Constraint] = {
        "orthogonal": Constraint(), "gradient": Slope(), "one-sided": Slope(one_sided=True), "clip": Clipped(0.01),
    }  # fmt: skip
    torch.manual_seed(seed)
    free, constraint = perceptron(x.shape[1], 1, width), constraints[kind]
    critic = LipschitzCritic(x.shape[1], (width, width)) if kind == "orthogonal" else free
    # Adam's momentum throws a clipped critic from one corner of the box to another (Arjovsky et al. 2017, section 4).
    optimizer = (
        torch.optim.RMSprop(critic.parameters(), lr=5e-4)
        if kind == "clip"
        else torch.optim.Adam(critic.parameters(), lr=5e-3, betas=(0.5, 0.9))
    )
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        on_x, on_y = critic(torch.cat((x, y))).split((len(x), len(y)))
        value = gan_loss(on_x, True, "wasserstein") + gan_loss(on_y, False, "wasserstein")
        term = constraint.term(critic, x, y) if len(x) == len(y) else None
        (value if term is None else value + term).backward()
        optimizer.step()
        decay.step()
        constraint.after(critic)
    with torch.no_grad():
        return float(critic(x).mean() - critic(y).mean()), critic
