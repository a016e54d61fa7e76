from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from volvelle.train.losses import head_cross_entropy, linear_cross_entropy


def case(n=37, d=8, v=53, dtype=torch.float64):
    torch.manual_seed(n)
    h = torch.randn(n, d, dtype=dtype, requires_grad=True)
    w = torch.randn(v, d, dtype=dtype, requires_grad=True)
    targets = torch.randint(v, (n,))
    targets[::5] = -100
    return h, w, targets


def grads(value, *inputs):
    return torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("chunk", [None, 1, 7, 100])
def test_value_and_gradients_are_those_of_the_whole_product(chunk):
    h, w, targets = case()
    whole = F.cross_entropy(h @ w.T, targets)
    wanted = grads(3 * whole, h, w)
    fused = linear_cross_entropy(h, w, targets, chunk=chunk)
    again = head_cross_entropy(h, lambda x: x @ w.T, targets, vocabulary=53, chunk=chunk)
    for ours in (fused, again):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)
        for got, want in zip(grads(3 * ours, h, w), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_frozen_weight_gets_no_gradient_and_no_grad_mode_works():
    h, w, targets = case()
    linear_cross_entropy(h, w.detach(), targets).backward()
    assert h.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(h, w, targets).requires_grad


def test_nothing_learnt_is_zero_with_zero_gradient():
    h, w, _ = case()
    loss = linear_cross_entropy(h, w, torch.full((37,), -100))
    loss.backward()
    assert loss.item() == 0
    assert h.grad.abs().sum() == 0


def test_under_autocast_it_is_close_and_gradients_have_the_inputs_dtype():
    h, w, targets = case(n=300, d=64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(h, w, targets, chunk=32)
    whole = F.cross_entropy(h @ w.T, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, whole, rtol=0.02, atol=0.02)
    for got, want in zip(grads(ours, h, w), grads(whole, h, w), strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() / want.norm() < 0.02


def test_logits_are_never_alive_at_once():
    n, v = 4096, 8192
    h = torch.randn(n, 16, requires_grad=True)
    w, targets = torch.randn(v, 16), torch.randint(v, (n,))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        linear_cross_entropy(h, w, targets, chunk=64).backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert peak < n * v * 4 / 10


def test_wrong_shapes_are_named():
    h, w, targets = case()
    with pytest.raises(ValueError, match=r"linear_cross_entropy: wants hidden \(N, d\).*\(37, 8\), \(53, 8\), \(36,\)"):
        linear_cross_entropy(h, w, targets[1:])
