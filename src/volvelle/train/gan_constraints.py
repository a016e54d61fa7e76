"""What holds a critic's slope during training: a term in its loss, or a change of its weights after an update.

A constraint is one object with two hooks; how the critic is built (spectral or orthogonal layers) is its own affair.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from volvelle.parts.adversarial.clip_weights import clip_weights
from volvelle.parts.adversarial.gradient_penalty import gradient_penalty, r1_penalty


class Constraint:
    """None at all."""

    def term(self, critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor | None:
        """What is added to the critic's loss."""
        return None

    def after(self, critic: nn.Module) -> None:
        """What happens to the critic after each of its updates."""


@dataclass(frozen=True)
class Slope(Constraint):
    """Slopes of 1 between data and samples (Gulrajani et al. 2017), or of at most 1 (Petzka et al. 2018)."""

    weight: float = 10.0
    one_sided: bool = False

    def term(self, critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        """The penalty, weighted."""
        return self.weight * gradient_penalty(critic, real, fake, one_sided=self.one_sided)


@dataclass(frozen=True)
class FlatOnData(Constraint):
    """Slopes of 0 on data: R1 of Mescheder et al. 2018, with γ = `weight`."""

    weight: float = 1.0

    def term(self, critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        """The penalty, weighted."""
        return self.weight * r1_penalty(critic, real)


@dataclass(frozen=True)
class Clipped(Constraint):
    """Weights in a box: Arjovsky et al. 2017."""

    bound: float = 0.01

    def after(self, critic: nn.Module) -> None:
        """Clamp every weight."""
        clip_weights(critic.parameters(), self.bound)
