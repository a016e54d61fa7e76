"""Distances between distributions: brute force, POT and scipy as oracles, duality, limits, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.stats import wasserstein_distance as scipy_distance

from volvelle.parts.transport import optimal_transport as exact
from volvelle.parts.transport.c_transform import c_transform, dual_bound
from volvelle.parts.transport.cost import transport_cost
from volvelle.parts.transport.optimal_transport import optimal_transport, wasserstein_distance
from volvelle.parts.transport.sinkhorn import sinkhorn
from volvelle.parts.transport.sliced import sliced_wasserstein
from volvelle.parts.transport.wasserstein_1d import wasserstein_1d

F64 = torch.float64


def clouds(n, m, d=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=draw, dtype=F64), torch.randn(m, d, generator=draw, dtype=F64) + 0.5


def weights(n, seed=0):
    w = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    w[0] = 0.0
    return w


def proves_itself(found, a, b, M, slack=1e-9):
    """Feasible on both sides, and no gap between them: by theorem both are optimal."""
    a, b = a / a.sum(), b / b.sum()
    assert (found.plan >= 0).all()
    torch.testing.assert_close(found.plan.sum(1), a, atol=slack, rtol=0)
    torch.testing.assert_close(found.plan.sum(0), b, atol=slack, rtol=0)
    reduced = M.detach().double() - found.u[:, None] - found.v
    assert reduced.min() >= -slack
    assert abs(found.gap) <= slack
    assert float((found.plan * reduced).sum()) <= slack  # complementary slackness
    assert found.dual == pytest.approx(float(a @ found.u + b @ found.v), abs=slack)


@pytest.mark.parametrize("p", [1, 2, 3.5])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 5), (5, 3), (2, 9)])
def test_costs_equal_a_loop(n, m, p):
    x, y = clouds(n, m, 3)
    loop = torch.tensor([[float((a - b).norm()) ** p for b in y] for a in x], dtype=F64)
    torch.testing.assert_close(transport_cost(x, y, p), loop)


def test_near_neighbours_keep_their_distance():
    x = 1000 + torch.randn(60, 4)
    y = x + 1e-3
    assert (transport_cost(x, y).diagonal() > 1e-3).all()
    assert not (torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist").diagonal() > 1e-3).all()
    with pytest.raises(ValueError, match="equal trailing shape"):
        transport_cost(x, y[:, :2])


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_equal_masses_equal_every_permutation_tried(n):
    x, y = clouds(n, n, seed=n)
    M = transport_cost(x, y)
    least = min(sum(float(M[i, j]) for i, j in enumerate(order)) for order in itertools.permutations(range(n))) / n
    found = optimal_transport(None, None, M)
    assert float(found.cost) == pytest.approx(least)
    proves_itself(found, torch.ones(n, dtype=F64), torch.ones(n, dtype=F64), M)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (6, 6), (12, 7), (30, 41)])
def test_any_masses_prove_themselves(n, m):
    x, y = clouds(n, m, seed=m)
    a, b = (weights(n), weights(m, 1)) if n > 1 else (torch.ones(1, dtype=F64), weights(m, 1))
    M = transport_cost(x, y, 2)
    proves_itself(optimal_transport(a, b, M), a, b, M)


def test_ties_repeated_points_and_equal_clouds_prove_themselves():
    x = torch.tensor([[0.0, 0.0]] * 3 + [[1.0, 0.0]] * 3, dtype=F64)
    M = transport_cost(x, x.flip(0))
    one = torch.ones(6, dtype=F64)
    found = optimal_transport(None, None, M)
    assert float(found.cost) == 0
    proves_itself(found, one, one, M)
    negative = M - 5
    proves_itself(optimal_transport(None, None, negative), one, one, negative)


@pytest.mark.peer
@pytest.mark.parametrize(("n", "m", "uniform"), [(40, 40, True), (25, 33, False)])
def test_pot_finds_the_same_cost(n, m, uniform):
    ot = pytest.importorskip("ot")
    x, y = clouds(n, m, seed=3)
    M = transport_cost(x, y)
    a, b = (torch.ones(n, dtype=F64), torch.ones(m, dtype=F64)) if uniform else (weights(n), weights(m, 1))
    theirs = float(ot.emd2((a / a.sum()).numpy(), (b / b.sum()).numpy(), M.numpy()))
    assert float(optimal_transport(a, b, M).cost) == pytest.approx(theirs, rel=1e-9)


def test_the_cost_has_the_gradients_of_the_envelope_theorem():
    x, y = clouds(6, 6)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: wasserstein_distance(x, y), x)
    assert torch.autograd.gradcheck(lambda x: wasserstein_distance(x, y, 2), x)
    a, b = weights(4) + 0.1, weights(5, 1) + 0.1
    M = transport_cost(*clouds(4, 5))
    cost = lambda a, b, M: optimal_transport(a, b, M).cost  # noqa: E731
    assert torch.autograd.gradcheck(cost, (a.requires_grad_(), b.requires_grad_(), M.requires_grad_()), atol=1e-6)


def test_an_assignment_that_is_not_the_best_is_caught(monkeypatch):
    def other(M):
        plan, u = original(M)
        return plan.roll(1, 0), u

    original = exact._assigned
    monkeypatch.setattr(exact, "_assigned", other)
    with pytest.raises(AssertionError):
        test_equal_masses_equal_every_permutation_tried(5)


def test_half_precision_costs_and_bad_input():
    M = transport_cost(*clouds(5, 5)).bfloat16()
    found = optimal_transport(None, None, M)
    assert found.cost.dtype == torch.bfloat16
    assert found.plan.dtype == F64
    for a, costs, said in (
        (None, torch.zeros(0, 3), "n, m >= 1"), (None, torch.tensor([[torch.nan]]), "finite"),
        (torch.tensor([-1.0, 2.0]), torch.zeros(2, 3), "not negative"), (torch.ones(3), torch.zeros(2, 3), "2 weights"),
        (torch.zeros(2), torch.zeros(2, 3), "not all zero"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            optimal_transport(a, None, costs)


# On a line


@pytest.mark.parametrize(
    ("n", "m", "weighted"), [(1, 1, False), (7, 7, False), (7, 7, True), (9, 4, False), (5, 11, True)]
)
def test_a_line_equals_scipy_and_the_exact_plan(n, m, weighted):
    x, y = (c[:, 0] for c in clouds(n, m, seed=n))
    x[0] = y[0]  # a tie
    a, b = (weights(n) + (n == 1), weights(m, 2) + (m == 1)) if weighted else (None, None)
    found = wasserstein_1d(x, y, a, b)
    assert float(found) == pytest.approx(scipy_distance(x, y, a, b), abs=1e-12)
    for p in (1, 2, 3):
        plan = optimal_transport(a, b, transport_cost(x[:, None], y[:, None], p))
        assert float(wasserstein_1d(x, y, a, b, p)) == pytest.approx(float(plan.cost), abs=1e-9)


@pytest.mark.peer
def test_pot_on_a_line_and_sliced():
    ot = pytest.importorskip("ot")
    x, y = clouds(11, 7, 3)
    a, b = weights(11), weights(7, 1)
    theirs = ot.wasserstein_1d(x.numpy(), y.numpy(), (a / a.sum()).numpy(), (b / b.sum()).numpy(), p=2)
    torch.testing.assert_close(wasserstein_1d(x, y, a, b, 2), torch.from_numpy(theirs))
    draw = torch.Generator().manual_seed(3)
    theta = torch.randn(3, 20, generator=draw, dtype=F64)
    theta = theta / theta.norm(dim=0)
    theirs = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=theta.numpy(), p=2)
    found = sliced_wasserstein(x, y, directions=20, generator=torch.Generator().manual_seed(3))
    assert float(found) == pytest.approx(float(theirs))


def test_gradients_and_types_on_a_line():
    x, y = (c[:, 0].clone() for c in clouds(6, 4))
    for p in (1, 2):
        assert torch.autograd.gradcheck(
            lambda u, v, p=p: wasserstein_1d(u, v, p=p), (x.requires_grad_(), y.requires_grad_())
        )
    assert wasserstein_1d(x.detach().half(), y.detach().half()).dtype == torch.float32
    assert torch.isnan(wasserstein_1d(torch.tensor([0.0, torch.nan]), torch.tensor([0.0, 1.0])))
    many = torch.randn(100_000)
    assert float(wasserstein_1d(many, many[:50_000])) < 0.02
    assert float(wasserstein_1d(many, many + 2)) == pytest.approx(2, rel=1e-5)
    for u, v in ((torch.zeros(0), torch.zeros(2)), (torch.zeros(2, 3), torch.zeros(2, 2))):
        with pytest.raises(ValueError, match="wasserstein_1d"):
            wasserstein_1d(u, v)
    with pytest.raises(ValueError, match="p must be"):
        wasserstein_1d(torch.zeros(2), torch.zeros(2), p=0.5)


def test_sliced_of_a_shift_is_known_and_never_above_the_exact_distance():
    x, y = clouds(50, 50, 3, seed=5)
    shift = torch.tensor([0.0, 0.0, 2.0], dtype=F64)
    # E |θ·t| = |t| / 2 on the sphere in three dimensions.
    found = sliced_wasserstein(x, x + shift, p=1, directions=20_000, generator=torch.Generator().manual_seed(0))
    assert float(found) == pytest.approx(1.0, rel=0.02)
    for p in (1, 2):
        assert sliced_wasserstein(x, y, p=p) <= wasserstein_distance(x, y, p)
    with pytest.raises(ValueError, match="directions >= 1"):
        sliced_wasserstein(x, y, directions=0)


# Potentials


def test_any_potential_is_a_lower_bound_and_transforms_settle():
    x, y = clouds(12, 9, seed=8)
    M = transport_cost(x, y)
    a, b = weights(12), weights(9, 1)
    least = float(optimal_transport(a, b, M).cost)
    for seed in range(30):
        potential = 3 * torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=F64)
        assert float(dual_bound(potential, M, a, b)) <= least + 1e-12
        once = c_transform(potential, M)
        twice = c_transform(once, M.T)
        assert (twice >= potential - 1e-12).all()
        torch.testing.assert_close(c_transform(twice, M), once)
    best = optimal_transport(a, b, M)
    assert float(dual_bound(best.u, M, a, b)) == pytest.approx(least)
    with pytest.raises(ValueError, match="potential must be"):
        c_transform(torch.zeros(3), M)


def test_for_a_distance_the_transform_of_a_lipschitz_potential_is_its_negative():
    x, _ = clouds(20, 1)
    M = transport_cost(x, x)
    potential = (x - 3).norm(dim=1)
    torch.testing.assert_close(c_transform(potential, M), -potential)


# Entropic


@pytest.mark.peer
def test_sinkhorn_equals_pot_s():
    ot = pytest.importorskip("ot")
    x, y = clouds(15, 9)
    a, b = weights(15) + 0.1, weights(9, 1) + 0.1
    M = transport_cost(x, y)
    theirs = ot.sinkhorn(
        (a / a.sum()).numpy(), (b / b.sum()).numpy(), M.numpy(), 0.05, method="sinkhorn_log", numItermax=20000
    )
    found = sinkhorn(a, b, M, 0.05, rounds=20000, tolerance=1e-11)
    torch.testing.assert_close(found.plan, torch.from_numpy(theirs), atol=1e-8, rtol=0)


def test_sinkhorn_s_limits_and_conditions():
    x, y = clouds(10, 8)
    a, b = weights(10), weights(8, 1)
    M = transport_cost(x, y)
    least = float(optimal_transport(a, b, M).cost)
    costs = []
    for reg in (10.0, 1.0, 0.1, 5e-3):
        found = sinkhorn(a, b, M, reg, rounds=20_000, tolerance=1e-7)
        torch.testing.assert_close(found.plan.sum(0), b / b.sum())
        assert found.error <= 1e-7
        # Entropic optimality: log P - log a bᵀ is (f + g - M) / ε wherever there is mass.
        full = torch.log(a / a.sum())[:, None] + torch.log(b / b.sum()) + (found.f[:, None] + found.g - M) / reg
        torch.testing.assert_close(found.plan, full.exp())
        costs.append(float(found.cost))
        assert float(found.cost) >= least - 1e-6
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == pytest.approx(least, rel=2e-3)
    independent = float(((a / a.sum())[:, None] * (b / b.sum()) * M).sum())
    assert float(sinkhorn(a, b, M, 1e5).cost) == pytest.approx(independent, rel=1e-3)


def test_a_falling_temperature_needs_fewer_rounds_and_nothing_overflows():
    x, y = clouds(20, 20)
    M = 1e3 * transport_cost(x, y).float()
    cold, warm = (sinkhorn(None, None, M, 5.0, rounds=20_000, tolerance=1e-3, scaling=s) for s in (1.0, 0.5))
    assert torch.isfinite(warm.plan).all()
    assert warm.rounds < cold.rounds
    tiny = sinkhorn(None, None, M, 1e-3, rounds=20, tolerance=1e-3)
    assert torch.isfinite(tiny.cost)
    assert tiny.error > 0


def test_sinkhorn_s_batches_gradient_and_bad_input():
    M = torch.stack([transport_cost(*clouds(5, 4, seed=s)) for s in range(3)])
    together = sinkhorn(None, None, M, 0.3, tolerance=1e-12)
    for i in range(3):
        alone = sinkhorn(None, None, M[i], 0.3, tolerance=1e-12, scaling=1.0)
        torch.testing.assert_close(together.plan[i], alone.plan, atol=1e-9, rtol=0)
    value = lambda M: sinkhorn(None, None, M, 0.3, rounds=5000, tolerance=1e-14).value  # noqa: E731
    assert torch.autograd.gradcheck(value, M[0].requires_grad_(), atol=1e-6)
    for options in ({"reg": 0.0}, {"reg": 1.0, "scaling": 0.0}, {"reg": 1.0, "rounds": 0}):
        with pytest.raises(ValueError, match="sinkhorn: wanted"):
            sinkhorn(None, None, M, **options)
    with pytest.raises(ValueError, match="not be negative"):
        sinkhorn(torch.tensor([-1.0, 1, 1, 1, 1]), None, M, 1.0)
    with pytest.raises(ValueError, match="wanted masses"):
        sinkhorn(torch.ones(4), None, M, 1.0)
    assert sinkhorn(None, None, M.detach().bfloat16(), 0.3).plan.dtype == torch.float32
