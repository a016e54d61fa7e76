"""Hybrid dilation rates and what gridding is: against brute force over paths, and against gradients of real layers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from volvelle.functional import gridding, hybrid_dilation_rates
from volvelle.nn import AtrousConv1d, AtrousConv2d
from volvelle.parts.convolution.hybrid_dilation import largest_distance

layers = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=5)


@given(layers)
@settings(max_examples=60, deadline=None)
def test_paths_are_those_of_brute_force(stack):
    rates, kernels = zip(*stack, strict=True)
    found = gridding(rates, kernels)
    counts: dict[int, int] = {}
    for taps in itertools.product(*(range(k) for k in kernels)):
        place = sum(r * tap for r, tap in zip(rates, taps, strict=True))
        counts[place] = counts.get(place, 0) + 1
    assert found.paths == tuple(counts.get(place, 0) for place in range(max(counts) + 1))
    assert sum(found.paths) == math.prod(kernels)
    assert found.field == 1 + sum(r * (k - 1) for r, k in stack)
    assert found.paths == gridding(rates[::-1], kernels[::-1]).paths, "the order does not matter"


@given(layers.filter(lambda stack: any(k > 1 for _, k in stack)))
@settings(max_examples=25, deadline=None)
def test_holes_and_grids_are_those_of_real_layers(stack):
    """Gradients of layers with weights of one: the number of paths, at the distances that are named."""
    rates, kernels = zip(*stack, strict=True)
    found = gridding(rates, kernels)
    net = nn.Sequential(*(AtrousConv1d(1, 1, k, dilation=r, bias=False) for r, k in stack)).double()
    for parameter in net.parameters():
        nn.init.ones_(parameter)
    at = found.field
    x = torch.zeros(1, 1, 2 * at + 1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(x)[0, 0, at], x)
    first = at + found.first
    assert tuple(gradient[0, 0, first : first + found.field].int().tolist()) == found.paths
    assert gradient[0, 0, :first].abs().sum() + gradient[0, 0, first + found.field :].abs().sum() == 0
    assert found.holes == tuple(i - at for i in range(first, first + found.field) if not gradient[0, 0, i])
    seen = gradient[0, 0].nonzero().flatten() - first
    assert found.grids == math.gcd(*seen.tolist()), "inputs seen lie on a lattice of that spacing"


def test_an_image_is_seen_where_row_and_column_are():
    rates = (2, 3)
    net = nn.Sequential(*(AtrousConv2d(1, 1, 3, dilation=r, bias=False) for r in rates))
    for parameter in net.parameters():
        nn.init.ones_(parameter)
    x = torch.zeros(1, 1, 15, 15, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(x)[0, 0, 7, 7], x)
    found = gridding(rates)
    assert found.holes == (-4, 4)
    field = gradient[0, 0, 2:13, 2:13]
    assert field.count_nonzero() / field.numel() == pytest.approx(found.coverage)
    assert torch.equal(field, torch.outer(torch.tensor(found.paths), torch.tensor(found.paths)).float())


@pytest.mark.parametrize("kernel", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_the_rates_keep_the_papers_rules(depth, kernel):
    top = gridding(hybrid_dilation_rates(depth, kernel), kernel).field
    fields = {None, *range(1 + (kernel - 1) * depth, top + 1, max(1, top // 25)), top}
    for field in fields:
        rates = hybrid_dilation_rates(depth, kernel, field=field)
        assert len(rates) == depth
        assert rates[0] == 1
        assert list(rates) == sorted(rates)
        assert depth == 1 or largest_distance(rates) <= kernel
        assert all(math.gcd(a, b) == 1 for a, b in itertools.combinations(rates, 2))
        found = gridding(rates, kernel)
        assert not found.holes
        assert found.grids == found.coverage == 1
        assert found.field >= (field or 0)


@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_a_field_asked_for_is_met_as_closely_as_the_rules_allow(kernel):
    """By trying all rates: none has a smaller sum, and of those none a smaller M_2."""
    depth = 4
    every = [
        (1, *rest)
        for rest in itertools.combinations_with_replacement(range(1, 28), depth - 1)
        if largest_distance((1, *rest)) <= kernel
        and not gridding((1, *rest), kernel).holes
        and all(math.gcd(a, b) == 1 for a, b in itertools.combinations(rest, 2))
    ]
    for total in range(depth, max(map(sum, every)) - 8, 3):
        rates = hybrid_dilation_rates(depth, kernel, field=1 + (kernel - 1) * total)
        best = min(sum(r) for r in every if sum(r) >= total)
        assert sum(rates) == best
        assert (largest_distance(rates), rates[::-1]) == min(
            (largest_distance(r), r[::-1]) for r in every if sum(r) == best
        )


def test_examples_of_the_paper():
    assert largest_distance((1, 2, 5)) == 2
    assert largest_distance((1, 2, 9)) == 5
    assert gridding((1, 2, 9)).holes
    assert gridding((2, 2, 2)).coverage < 0.3
    assert gridding((2, 4, 8)).grids == 2
    assert hybrid_dilation_rates(3, field=gridding((2, 2, 2)).field) == (1, 2, 3)
    assert hybrid_dilation_rates(3, field=17) == (1, 2, 5)


def test_the_rules_are_sharp():
    """M_2 <= K with r_1 = 1 leaves no hole for K >= 3, and for K = 3 only that; for K = 2 it is not enough."""
    for kernel in (2, 3, 4, 5):
        for rest in itertools.combinations_with_replacement(range(1, 13), 3):
            kept = largest_distance((1, *rest)) <= kernel
            whole = not gridding((1, *rest), kernel).holes
            if kernel >= 3 and kept:
                assert whole, (kernel, rest)
            if kernel == 3:
                assert kept == whole, rest
    assert largest_distance((1, 2, 5)) <= 2
    assert gridding((1, 2, 5), 2).holes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hybrid_dilation_rates(0), "depth must be >= 1 and kernel >= 2, got 0 and 3"),
        (lambda: hybrid_dilation_rates(2, 1), "kernel >= 2, got 2 and 1"),
        (lambda: hybrid_dilation_rates(3, field=26), "fields from 7 to 25 without holes, got field 26"),
        (lambda: hybrid_dilation_rates(3, field=6), "got field 6"),
        (lambda: gridding(()), "at least one rate is needed"),
        (lambda: gridding((1, 0)), "rates must be at least 1"),
        (lambda: gridding((1, 2), (3, 3, 3)), "kernel must be at least 1, once or for each of 2 axes"),
    ],
)
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
