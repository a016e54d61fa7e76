"""The effective receptive field (Luo et al. 2016): how much each pixel of a unit's field really matters to it.

E(p) = mean over seeds of Σ_c (d u / d x_{c, p})², u the middle unit of a layer, its channels added with random signs,
x Gaussian noise, and the weights those of the module. In deep networks E is close to a Gaussian far smaller than the
field: the many paths to the middle outnumber the few to the border.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from volvelle.errors import UsageError
from volvelle.inspect.exported import example_input
from volvelle.inspect.receptive_fields import ReceptiveField, receptive_field
from volvelle.systems.modes import evaluating


@dataclass(frozen=True)
class EffectiveField:
    """Energy of the gradient over the input (sum 1), and its spread against the box of the analysis."""

    node: str
    """Module whose middle unit was looked at."""
    energy: Tensor
    centre: tuple[float, ...]
    """Mean position on every axis, in pixels."""
    sigma: tuple[float, ...]
    """Standard deviation on every axis."""
    box: tuple[tuple[int, int], ...]
    """First and last coordinate that the unit reads locally, inside the input."""
    seeds: int

    @property
    def share(self) -> tuple[float, ...]:
        """Four standard deviations as a share of the box, on every axis."""
        return tuple(4 * s / (b - a + 1) for s, (a, b) in zip(self.sigma, self.box, strict=True))

    def lines(self) -> list[str]:
        """The figures in words."""
        spread = " x ".join(f"{s:.1f}" for s in self.sigma)
        box = " x ".join(str(b - a + 1) for a, b in self.box)
        share = " x ".join(f"{100 * s:.0f} %" for s in self.share)
        return [f"sigma {spread} px, {self.seeds} seeds", f"field {box} px inside the input", f"4 sigma: {share} of it"]

    def svg(self) -> str:
        """The energy as a heat map with its 2-sigma ellipse and the box."""
        from volvelle.inspect.receptive_field_drawing import heat

        return heat(self)

    def record(self) -> dict[str, Any]:
        """All values but the picture, for JSON."""
        return {
            "node": self.node, "centre": list(self.centre), "sigma": list(self.sigma), "seeds": self.seeds,
            "box": [list(span) for span in self.box], "share": list(self.share),
        }  # fmt: skip


def effective_field(
    module: nn.Module,
    input_shape: Sequence[int],
    *,
    at: str | None = None,
    seeds: int = 8,
    field: ReceptiveField | None = None,
) -> EffectiveField:
    """Gradient energy of the middle unit of the layer `at` (a module's path; the last features when left out).

    `field` is the receptive field when it was computed before. Raises UsageError for a layer whose result no longer
    lies in space. The module and torch's random state are as before afterwards.

    >>> net = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(4)))
    >>> found = effective_field(net, (1, 1, 15, 15), seeds=2)
    >>> found.box, found.energy.shape
    (((3, 11), (3, 11)), torch.Size([15, 15]))
    """
    if seeds < 1:
        raise UsageError(f"effective_field: seeds must be at least 1, got {seeds}")
    field = receptive_field(module, input_shape) if field is None else field
    node = field.features if at is None else field[at]
    if not node.spatial or len(node.shape) != len(field.input_shape):
        raise UsageError(
            f"effective_field: the result of {node.module or node.op}, shape {node.shape}, does not lie in space",
            tip="name a layer before the pooling with at=",
        )
    middle = [node.shape[axis] // 2 for axis in field.axes]
    part = module.get_submodule(node.module)
    energy = torch.zeros([field.input_shape[axis] for axis in field.axes], dtype=torch.float64)
    with torch.random.fork_rng(), evaluating(module):
        for seed in range(seeds):
            torch.manual_seed(seed)
            energy += _energy(module, part, field, middle)
    total = energy.sum()
    energy = energy / total if total > 0 else energy
    moments = [_moments(energy.movedim(i, 0).reshape(energy.shape[i], -1).sum(1)) for i in range(energy.dim())]
    box = tuple(
        (max(0, math.ceil(c - size / 2 + 0.5)), min(n - 1, math.floor(c + size / 2 - 0.5)))
        for c, size, n in (
            (float(a.centre + a.stride * m), a.local, field.input_shape[axis])  # pyright: ignore[reportOptionalOperand]
            for a, m, axis in zip(node.axes, middle, field.axes, strict=True)
        )
    )
    centre, sigma = tuple(m for m, _ in moments), tuple(s for _, s in moments)
    return EffectiveField(node.module or field.model, energy, centre, sigma, box, seeds)


def _energy(module: nn.Module, part: nn.Module, field: ReceptiveField, middle: Sequence[int]) -> Tensor:
    like = example_input(module, field.input_shape, None)
    x = torch.randn_like(like).requires_grad_()
    results: list[Any] = []
    hook = part.register_forward_hook(lambda _module, _inputs, result: results.append(result))
    try:
        module(x)
    finally:
        hook.remove()
    value = results[-1]
    value = value[-1] if isinstance(value, list | tuple) else value
    for axis, place in zip(field.axes, middle, strict=True):
        value = value.narrow(axis, place, 1)
    signs = torch.randint(0, 2, value.shape, device=value.device) * 2 - 1
    (gradient,) = torch.autograd.grad((value * signs).sum(), x)
    others = [dim for dim in range(gradient.dim()) if dim not in field.axes]
    return gradient.double().square().sum(others).cpu()


def _moments(mass: Tensor) -> tuple[float, float]:
    places = torch.arange(len(mass), dtype=mass.dtype)
    mean = float((mass * places).sum())
    return mean, math.sqrt(max(0.0, float((mass * (places - mean) ** 2).sum())))
