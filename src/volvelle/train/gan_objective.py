"""A generator against a critic, as an objective of two phases: the critic plays first, as often as asked.

Works on any two Modules: `latents(count)` gives what the generator maps, `real(batch)` what it is to look like.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from volvelle.parts.adversarial.losses import GanLoss, gan_loss
from volvelle.train.gan_constraints import Constraint
from volvelle.train.phase import Loss, Objective, OptimizerFactory, Phase, trainable
from volvelle.train.schedule import Schedule, constant


@dataclass(frozen=True)
class Game:
    """The rules: which loss, what holds the critic, how often it plays for each turn of the generator."""

    loss: GanLoss = "non-saturating"
    constraint: Constraint = field(default_factory=Constraint)
    critic_steps: int = 1


class GANObjective(Objective):
    """Train `generator` and `critic` by the rules of a game. `look()` gives what evaluations measure.

    In the critic's phase samples come without gradients; in the generator's the critic's weights ask for none (the loop
    sees to it). Each phase draws its own latent numbers.
    """

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        game: Game,
        *,
        optimizers: tuple[OptimizerFactory, OptimizerFactory],
        latents: Callable[[int], Tensor],
        real: Callable[[Any], Tensor],
        look: Callable[[int], Mapping[str, float]] | None = None,
        schedule: Callable[[int], Schedule] = lambda steps: constant(),
        clip: float | None = None,
    ):
        self.generator, self.critic, self.game = generator, critic, game
        self.optimizers, self.latents, self.real, self.look = optimizers, latents, real, look
        self.schedule, self.clip, self.step = schedule, clip, 0

    def modules(self) -> Mapping[str, nn.Module]:
        """Both players."""
        return {"generator": self.generator, "critic": self.critic}

    def phases(self, steps: int) -> Sequence[Phase]:
        """The critic, then the generator. `optimizers` are the generator's and the critic's."""
        plays, taught = self.optimizers
        rate, clip = self.schedule(steps), self.clip
        repeats = self.game.critic_steps
        # A schedule counts a phase's own updates.
        slower = (lambda update: rate(update // repeats)) if repeats > 1 else rate
        weights = trainable(self.critic)
        return [
            Phase("critic", weights, self.judge, taught, slower, repeats=repeats, clip=clip, after=self._after_critic),
            Phase("generator", trainable(self.generator), self.fool, plays, rate, clip=clip),
        ]

    def judge(self, batch: Any) -> Loss:
        """The critic's loss on data and as many samples. `distance` is E s(data) - E s(samples)."""
        real = self.real(batch)
        with torch.no_grad():
            fake = self.generator(self.latents(len(real)))
        on_real, on_fake = self.critic(real), self.critic(fake)
        value = gan_loss(on_real, True, self.game.loss) + gan_loss(on_fake, False, self.game.loss)
        metrics: dict[str, Tensor | float] = {"distance": (on_real.float().mean() - on_fake.float().mean()).detach()}
        term = self.game.constraint.term(self.critic, real, fake)
        if term is not None:
            value = value + term
            metrics["penalty"] = term.detach()
        return Loss(value, metrics, weight=len(real))

    def fool(self, batch: Any) -> Loss:
        """The generator's loss, on as many samples as there are data."""
        count = len(self.real(batch))
        value = gan_loss(self.critic(self.generator(self.latents(count))), True, self.game.loss, for_="generator")
        return Loss(value, weight=count)

    def units(self, batch: Any) -> tuple[float, str]:
        """Pictures."""
        return float(len(self.real(batch))), "pictures"

    def after_step(self, step: int) -> None:
        """Count."""
        self.step = step + 1

    def evaluate(self) -> Mapping[str, float]:
        """What `look` sees at this step."""
        return {} if self.look is None else self.look(self.step)

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.step = state["step"]

    def _after_critic(self) -> None:
        self.game.constraint.after(self.critic)
