"""Bottleneck adapters: the equation against a loop, its gradients, identity at the start, the parallel form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from volvelle.parts.lowrank.bottleneck import BottleneckAdapter, bottleneck_adapter


def scrambled(adapter):
    torch.manual_seed(0)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5), (2, 0, 5)])
def test_equals_a_loop(activation, shape):
    adapter = scrambled(BottleneckAdapter(5, 3, activation=activation, scale=0.5, dtype=torch.float64))
    x, residual = torch.randn(2, *shape, dtype=torch.float64)
    function = {"relu": lambda v: max(v, 0.0), "silu": lambda v: v / (1 + np.exp(-v))}.get(
        activation, lambda v: v * 0.5 * (1 + torch.erf(torch.tensor(v / 2**0.5, dtype=torch.float64)).item())
    )
    weights = {name: p.detach().numpy() for name, p in adapter.named_parameters()}
    rows, bases = x.reshape(-1, 5).numpy(), residual.reshape(-1, 5).numpy()
    expected = np.zeros_like(rows)
    for n, row in enumerate(rows):
        inner = [function(sum(weights["down"][i] * row) + weights["down_bias"][i]) for i in range(3)]
        for j in range(5):
            expected[n, j] = bases[n, j] + 0.5 * (sum(weights["up"][j] * inner) + weights["up_bias"][j])
    np.testing.assert_allclose(adapter(x, residual).detach().reshape(-1, 5).numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(adapter(x), adapter(x, x))


def test_gradients_in_double():
    adapter = scrambled(BottleneckAdapter(5, 3, activation="gelu", dtype=torch.float64))
    inputs = [torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True), *adapter.parameters()]
    run = lambda *t: bottleneck_adapter(*t, scale=2.0, activation="gelu")  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_one_is_the_identity_bit_for_bit(dtype):
    x, residual = torch.randn(2, 3, 16, dtype=dtype)
    adapter = BottleneckAdapter(16, 4)
    assert torch.equal(adapter(x), x)
    assert torch.equal(adapter(x, residual), residual)
    adapter(x).float().sum().backward()
    assert adapter.up.grad is not None
    assert adapter.up.grad.dtype == torch.float32
    assert adapter.up.grad.abs().sum() > 0, "or it would never learn"


def test_dropout_only_while_training():
    adapter, x = scrambled(BottleneckAdapter(16, 8, dropout=0.5)), torch.randn(4, 16)
    assert not torch.equal(adapter(x), adapter(x))
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"down must be \(m, 4\) and up \(4, m\).*got down \(2, 5\)"):
        bottleneck_adapter(torch.ones(1, 4), torch.ones(2, 5), None, torch.ones(5, 2), None)
    with pytest.raises(ValueError, match="widths must be at least 1, got 4 and 0"):
        BottleneckAdapter(4, 0)
    with pytest.raises(ValueError, match="activation must be one of relu, gelu, silu, got 'tanh'"):
        BottleneckAdapter(4, 2, activation="tanh")


def test_exports_to_one_graph():
    adapter, x = scrambled(BottleneckAdapter(5, 3)), torch.randn(3, 5)
    torch.testing.assert_close(torch.export.export(adapter, (x,)).module()(x), adapter(x))
