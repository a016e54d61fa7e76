"""The gated product in 16 bits: torch's own bits forward and backward, and only its two arguments are kept."""

from __future__ import annotations

import pytest
import torch

from volvelle.systems.language.components import ACTIVATIONS
from volvelle.systems.language.gated import gated_product


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bits_are_those_of_the_two_operations(name, dtype):
    torch.manual_seed(0)
    activation = ACTIVATIONS[name]
    gate, up, weight = (torch.randn(3, 7, 12).mul(2).to(dtype) for _ in range(3))
    found = []
    for product in (lambda g, u: gated_product(activation, g, u), lambda g, u: activation(g) * u):
        leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
        out = product(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, weight)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def kept(gate, up):
    """What the backward pass keeps, and the name of its node."""
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        node = type(gated_product(torch.nn.functional.silu, gate, up).grad_fn).__name__
    return node, seen


def test_it_keeps_its_arguments_and_nothing_else():
    gate, up = (torch.randn(4, 8, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    node, seen = kept(gate, up)
    assert node == "_GatedProductBackward"
    assert {t.data_ptr() for t in seen} == {gate.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_with_one_gradient_or_in_fp32_it_is_the_plain_product(wanted):
    gate, up = (torch.randn(4, 8, dtype=torch.bfloat16).requires_grad_(want) for want in wanted)
    assert kept(gate, up)[0] == "MulBackward0"
    gate, up = (torch.randn(4, 8, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert kept(gate, up)[0] == "MulBackward0"
    assert torch.autograd.gradgradcheck(lambda g, u: gated_product(torch.nn.functional.silu, g, u), (gate, up))
