"""A certified bound never lies above the exact distance, whatever the critic's weights are."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from volvelle.parts.adversarial.group_sort import GroupSort
from volvelle.parts.adversarial.orthogonal import OrthogonalLinear
from volvelle.parts.transport import certified
from volvelle.parts.transport.certified import certified_w1
from volvelle.parts.transport.optimal_transport import wasserstein_distance


class Scaled(nn.Module):
    """A linear critic, which knows its slope; `said` exaggerates."""

    def __init__(self, width, slope=1.0, said=1.0):
        super().__init__()
        self.direction = nn.Parameter(torch.nn.functional.normalize(torch.ones(width), dim=0) * slope)
        self.said = said

    def forward(self, x):
        return x @ self.direction

    def lipschitz(self):
        return float(self.direction.norm()) * self.said


class Stack(nn.Module):
    """Orthogonal layers with GroupSort between, drawn at random and not trained."""

    def __init__(self, width, depth, scale):
        super().__init__()
        sizes = [width, *[8] * depth, 1]
        layers = [OrthogonalLinear(a, b, rounds=6) for a, b in itertools.pairwise(sizes)]
        with torch.no_grad():
            for layer in layers:
                layer.weight.copy_(scale * torch.randn_like(layer.weight))
        parts = [part for layer in layers[:-1] for part in (layer, GroupSort(2))]
        self.layers, self.parts = nn.ModuleList(layers), nn.Sequential(*parts, layers[-1])

    def forward(self, x):
        return self.parts(x)

    def lipschitz(self):
        constant = 1.0
        for layer in self.layers:
            constant *= layer.lipschitz()
        return constant


def bounded(seed):
    torch.manual_seed(seed)
    n, m, d = (int(torch.randint(1, high, ())) for high in (40, 40, 6))
    x, y = torch.randn(n, d), torch.randn(m, d) * 2 + 1
    critic = Stack(d, seed % 4, 10.0 ** (seed % 7 - 3))
    return certified_w1(critic, x, y), float(wasserstein_distance(x.double(), y.double()))


def hundred(count=100):
    found = [bounded(seed) for seed in range(count)]
    assert all(0 <= bound <= exact for bound, exact in found)
    assert sum(bound > 0.01 for bound, _ in found) > 0.3 * count, "bounds of zero prove nothing"


def test_random_critics_promise_too_much_never():
    hundred(count=25)


@pytest.mark.slow
def test_a_hundred_random_critics_promise_too_much_never():
    hundred()


def test_a_shift_along_the_critic_is_found_exactly_but_never_exceeded():
    for size in (1e-6, 1.0, 1e6):
        x = torch.randn(50, 3) * size
        shift = size * torch.nn.functional.normalize(torch.ones(3), dim=0)
        y = x - shift
        exact = float(wasserstein_distance(x.double(), y.double()))
        for slope in (1.0, 7.0):
            found = certified_w1(Scaled(3, slope), x, y, batch=7)
            assert found <= exact
            assert found == pytest.approx(exact, rel=1e-5)


def test_far_from_the_origin_rounding_is_taken_off():
    x = torch.randn(40, 2, dtype=torch.float64) + 1e9
    exact = float(wasserstein_distance(x, x - 1e-3))
    found = certified_w1(Scaled(2), x, x - 1e-3)
    assert found <= exact + 1e-15


def test_what_is_wrong_is_named():
    x = torch.randn(4, 2)
    with pytest.raises(TypeError, match="dual_bound"):
        certified_w1(nn.Linear(2, 1), x, x)
    with pytest.raises(ValueError, match="points on both sides"):
        certified_w1(Scaled(2), x[:0], x)
    with pytest.raises(ValueError, match="one score a point"):
        certified_w1(OrthogonalLinear(2, 3), x, x)
    with pytest.raises(ValueError, match="finite and above 0"):
        certified_w1(Scaled(2, said=0.0), x, x)
    assert certified_w1(Scaled(2), x, x) == 0.0


def test_a_constant_that_is_too_small_is_caught(monkeypatch):
    original = OrthogonalLinear.lipschitz
    monkeypatch.setattr(OrthogonalLinear, "lipschitz", lambda self: 0.3 * original(self))
    with pytest.raises(AssertionError):
        hundred(count=10)


def test_the_critic_itself_is_not_changed():
    critic = Scaled(2)
    certified_w1(critic, torch.randn(3, 2), torch.randn(3, 2))
    assert critic.direction.dtype == torch.float32
    assert critic.training
    assert certified.ROUNDING < 1e-6
