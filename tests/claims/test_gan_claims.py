"""Claims on adversarial training: their measurements see what they should, and would see if it were otherwise."""

from __future__ import annotations

import pytest
import torch

from volvelle.claims import gan, gan_points, wgan
from volvelle.parts.adversarial import losses
from volvelle.parts.adversarial.orthogonal import OrthogonalLinear
from volvelle.parts.transport import optimal_transport


def held(findings):
    return [finding.what for finding in findings if finding.held is False] == []


def test_the_best_discriminator_s_value_and_a_mutant():
    assert held(gan._known_densities(2))


def test_exchanged_labels_are_seen(monkeypatch):
    original = losses._each
    monkeypatch.setattr(losses, "_each", lambda s, real, kind, player: original(s, not real, kind, player))
    assert not held(gan._known_densities(1))


def test_lines_and_duality():
    assert held(wgan._linear())
    assert held(wgan._duality(2))


def test_a_plan_that_is_not_the_best_is_seen(monkeypatch):
    original = optimal_transport._assigned

    def other(M):
        plan, u = original(M)
        return plan.roll(1, 0), u

    monkeypatch.setattr(optimal_transport, "_assigned", other)
    assert not held(wgan._duality(2))


def test_certificates_hold_and_a_wrong_constant_is_seen(monkeypatch):
    monkeypatch.setattr(wgan, "CASES", 4)
    assert held(wgan._certified(4))
    original = OrthogonalLinear.lipschitz
    monkeypatch.setattr(OrthogonalLinear, "lipschitz", lambda self: 0.3 * original(self))
    assert not held(wgan._certified(4))


def test_clouds_are_seeded_and_modes_are_counted():
    assert all(torch.equal(a, b) for a, b in zip(wgan.clouds(3), wgan.clouds(3), strict=True))
    grid = gan_points.grid()
    draw = torch.Generator().manual_seed(0)
    assert grid.covered(grid.draw(2500, draw))[0] == 25
    alone = grid.centres[:3].repeat(500, 1)
    assert grid.covered(alone)[0] == 3
    assert grid.covered(alone + 0.4)[1] == 0.0


def test_correlation_leaves_the_first_look_out():
    seen = [{"exact": 9.0, "critic": -50.0}, *({"exact": float(i), "critic": 2.0 * i} for i in range(1, 5))]
    assert gan_points.correlation(seen) == pytest.approx(1)


def test_a_game_on_points_is_looked_at_on_the_way():
    game = next(iter(wgan._games().values()))
    played = gan_points.play(game, gan_points.ring(), 2, seed=0, look_every=1, samples=7)
    assert played.samples.shape == (7, 2)
    assert [row["step"] for row in played.seen] == [0, 1, 2]
    assert all(row["exact"] > 0 for row in played.seen)
    again = gan_points.play(game, gan_points.ring(), 2, seed=0, look_every=1, samples=7)
    assert torch.equal(played.samples, again.samples)


@pytest.mark.slow
@pytest.mark.parametrize("claim", [gan, wgan])
def test_the_quick_measurement_holds(claim):
    found = claim.measure("quick")
    assert found.verdict == "held", [finding for finding in found.findings if finding.held is False]
