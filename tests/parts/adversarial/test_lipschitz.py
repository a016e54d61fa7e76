"""Layers that bound a critic's slope: orthogonal layers, GroupSort, spectral normalisation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from volvelle.parts.adversarial import orthogonal
from volvelle.parts.adversarial.group_sort import GroupSort, group_sort
from volvelle.parts.adversarial.orthogonal import OrthogonalLinear, orthogonal_linear, orthonormalize
from volvelle.parts.adversarial.spectral_norm import SpectralNorm, power_iteration, spectral_norm


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (1, 4), (4, 1), (1, 1)])
def test_orthonormalized_is_the_polar_factor(shape):
    torch.manual_seed(0)
    w = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close(orthonormalize(w, 60), left @ right, rtol=1e-9, atol=1e-9)
    assert values.min() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounds", [0, 1, 5, 16])
def test_no_number_of_rounds_lengthens_anything(rounds, dtype):
    torch.manual_seed(1)
    for scale in (1e-6, 1.0, 1e6):
        for w in (torch.randn(9, 6), torch.ones(6, 6), torch.zeros(4, 4), torch.eye(5)):
            found = orthonormalize((scale * w).to(dtype), rounds)
            slack = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
            assert found.dtype == dtype
            assert float(torch.linalg.matrix_norm(found.double(), 2)) <= 1 + slack


def test_a_first_scale_that_is_too_small_is_caught(monkeypatch):
    original = orthogonal._scale
    monkeypatch.setattr(orthogonal, "_scale", lambda w: 0.1 * original(w))
    with pytest.raises(AssertionError):
        test_no_number_of_rounds_lengthens_anything(1, torch.float64)


def test_gradients_through_the_rounds():
    w = torch.randn(3, 4, dtype=torch.float64)
    # The scale is a constant of the graph; with enough rounds the result does not depend on it.
    assert torch.autograd.gradcheck(lambda x: orthonormalize(x, 40), w.requires_grad_(), atol=1e-5)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: orthogonal_linear(x, w, rounds=8), x.requires_grad_())


def test_the_layer_knows_its_constant_and_starts_orthonormal():
    layer = OrthogonalLinear(7, 4)
    assert layer.lipschitz() == pytest.approx(1, abs=1e-6)
    x, y = torch.randn(2, 50, 7)
    assert ((layer(x) - layer(y)).norm(dim=1) <= (x - y).norm(dim=1) * (1 + 1e-5)).all()
    wide = OrthogonalLinear(4, 7, bias=False)
    torch.testing.assert_close(wide(x[:, :4]).norm(dim=1), x[:, :4].norm(dim=1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="wanted a matrix"):
        orthonormalize(torch.zeros(3), 4)
    with pytest.raises(ValueError, match="rounds >= 0"):
        orthonormalize(torch.zeros(3, 3), -1)


@pytest.mark.parametrize("dim", [-1, 1, 0])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_group_sort_equals_a_loop(size, dim):
    x = torch.randn(6, 12, 6, dtype=torch.float64)
    moved = x.movedim(dim, -1)
    loop = torch.cat([part.sort(-1).values for part in moved.split(size, -1)], -1).movedim(-1, dim)
    assert torch.equal(group_sort(x, size, dim=dim), loop)


def test_group_sort_keeps_slopes_and_distances():
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: group_sort(x, 2), x.requires_grad_())
    jacobian = torch.autograd.functional.jacobian(lambda x: group_sort(x, 3), x[0].detach())
    assert torch.equal(jacobian @ jacobian.T, torch.eye(6, dtype=torch.float64))  # a permutation
    with pytest.raises(ValueError, match="multiple of size"):
        group_sort(x, 4)
    assert torch.isnan(GroupSort(2)(torch.tensor([torch.nan, 1.0]))).any()


@pytest.mark.parametrize("layer", [nn.Linear(6, 9), nn.Conv2d(3, 5, 3)], ids=["linear", "convolution"])
def test_spectral_norm_equals_torch_s(layer):
    torch.manual_seed(0)
    ours, theirs = copy.deepcopy(layer), parametrizations.spectral_norm(copy.deepcopy(layer))
    parametrize.register_parametrization(ours, "weight", SpectralNorm(ours.weight))
    with torch.no_grad():
        ours.parametrizations.weight[0].v.copy_(theirs.parametrizations.weight[0]._v)
    x = torch.randn(2, *((6,) if isinstance(layer, nn.Linear) else (3, 7, 7)))
    for _ in range(3):
        found, expected = ours(x), theirs(x)
        torch.testing.assert_close(found, expected)
        found.sum().backward()
        expected.sum().backward()
    mine, other = (m.parametrizations.weight.original.grad for m in (ours, theirs))
    torch.testing.assert_close(mine, other)
    ours.eval()
    before = ours.parametrizations.weight[0].u.clone()
    assert torch.equal(ours(x), ours(x))
    assert torch.equal(before, ours.parametrizations.weight[0].u)


def test_power_iteration_finds_the_largest_singular_value():
    w = torch.diag(torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64))
    u, v = power_iteration(w, torch.ones(3, dtype=torch.float64) / 3**0.5, rounds=60)
    assert float(torch.dot(u, w @ v)) == pytest.approx(5)
    torch.testing.assert_close(spectral_norm(w, u, v), w / 5)
    with pytest.raises(ValueError, match="wanted v of shape"):
        power_iteration(w, torch.ones(2))


def test_two_uses_in_one_graph_can_be_differentiated():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight))
    (layer(torch.ones(1, 4)) + layer(torch.zeros(1, 4))).sum().backward()
    assert torch.isfinite(layer.parametrizations.weight.original.grad).all()


def test_orthonormalize_is_what_the_layer_applies(monkeypatch):
    layer = OrthogonalLinear(3, 3)
    monkeypatch.setattr(orthogonal, "orthonormalize", lambda w, rounds: 2 * w)
    with pytest.raises(AssertionError):
        assert layer.lipschitz() <= 1 + 1e-6
