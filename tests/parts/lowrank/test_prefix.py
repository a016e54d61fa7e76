"""A prefix's layout and network: a loop oracle, PEFT's encoder, gradients, and what is left after training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from volvelle.parts.lowrank.prefix import PrefixStates, prefix_states

SIZES = {"length": 5, "layers": 3, "kv_heads": 2, "head_width": 4}


def oracle(table, layers, heads):
    """P[i] holds (layer, key or value, head, feature)."""
    d = table.shape[1] // (2 * layers * heads)
    out = np.zeros((layers, 2, 1, heads, len(table), d))
    for i, row in enumerate(table):
        numbers = iter(row)
        for layer in range(layers):
            for part in range(2):
                for head in range(heads):
                    for feature in range(d):
                        out[layer, part, 0, head, i, feature] = next(numbers)
    return out


def test_the_layout_against_a_loop():
    table = torch.randn(5, 2 * 3 * 2 * 4, dtype=torch.float64)
    assert np.array_equal(prefix_states(table, 3, 2).numpy(), oracle(table.numpy(), 3, 2))


def test_the_network_against_numpy():
    torch.manual_seed(0)
    prefix = PrefixStates(**SIZES, hidden=7, width=6).double()
    first, second = prefix.first, prefix.second
    w1, b1, w2, b2 = (p.detach().numpy() for p in (first.weight, first.bias, second.weight, second.bias))
    p = np.tanh(prefix.table.detach().numpy() @ w1.T + b1) @ w2.T + b2
    np.testing.assert_allclose(prefix().detach().numpy(), oracle(p, 3, 2))
    assert prefix.table.shape == (5, 6)
    assert prefix.stored == 5 * 3 * 2 * 2 * 4


@pytest.mark.peer
@pytest.mark.parametrize("hidden", [None, 7])
def test_parameters_mean_what_they_mean_in_peft(hidden):
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=5, token_dim=8, num_layers=3, num_attention_heads=2, num_transformer_submodules=1,
        encoder_hidden_size=hidden, prefix_projection=hidden is not None,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = peft.PrefixEncoder(config)
    torch.manual_seed(0)
    ours = PrefixStates(**SIZES, hidden=hidden)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    with torch.no_grad():
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.copy_(other)
    flat = theirs(torch.arange(5)[None])[0]
    torch.testing.assert_close(ours.flat(), flat)
    views = flat.view(1, 5, 6, 2, 4).permute(2, 0, 3, 1, 4).split(2)
    for layer, states in enumerate(views):
        torch.testing.assert_close(ours()[layer], states)


@pytest.mark.parametrize("hidden", [None, 7])
@pytest.mark.parametrize("started", [False, True])
def test_folding_keeps_the_prefix_bit_for_bit(hidden, started):
    torch.manual_seed(0)
    start = torch.randn(5, 48) if started else None
    prefix = PrefixStates(**SIZES, hidden=hidden, start=start)
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = prefix()
    assert torch.equal(prefix.fold()(), before)
    assert [name for name, _ in prefix.named_parameters()] == ["table"]
    assert prefix.table.numel() == prefix.stored
    assert torch.equal(prefix.flat(), prefix.table)


@pytest.mark.parametrize("hidden", [None, 7])
def test_a_start_is_where_training_begins_and_gradients_flow(hidden):
    start = torch.randn(5, 48)
    prefix = PrefixStates(**SIZES, hidden=hidden, start=start)
    assert torch.equal(prefix.flat(), start)
    prefix().square().sum().backward()
    moved = [name for name, p in prefix.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert moved == (["table"] if hidden is None else ["second.weight", "second.bias"])
    with torch.no_grad():
        for parameter in prefix.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    prefix.zero_grad()
    prefix().square().sum().backward()
    assert all(bool(p.grad.any()) for p in prefix.parameters())


def test_gradients_in_double():
    torch.manual_seed(0)
    prefix = PrefixStates(2, layers=2, kv_heads=1, head_width=2, hidden=3, width=2).double()
    inputs = (prefix.table, prefix.first.weight, prefix.first.bias, prefix.second.weight, prefix.second.bias)
    call = lambda table, *mlp: prefix_states(table, 2, 1, mlp=mlp)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_a_generator_seeds_the_parameters():
    one, other = (PrefixStates(**SIZES, hidden=7, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"prefix_states: a prefix must be \(l, 2 \* 2 layers \* 2 heads \* d\)"):
        prefix_states(torch.zeros(3, 12), 2, 2)
    with pytest.raises(ValueError, match=r"must be at least 1, got \(5, 0, 2, 4, None\)"):
        PrefixStates(**{**SIZES, "layers": 0})
    with pytest.raises(ValueError, match=r"start must be \(5, 48\), got \(5, 4\)"):
        PrefixStates(**SIZES, start=torch.zeros(5, 4))
