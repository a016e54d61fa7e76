"""RMSNorm with a frozen gain in bf16: torch's own bits forward, gradients as near to fp64 as torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from volvelle.systems.language.norms import RMSNorm


@pytest.mark.parametrize("shape", [(3, 5, 48), (2, 7), (1, 1, 576)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_is_torchs_and_the_gradient_as_near(shape, dtype):
    torch.manual_seed(0)
    ours, theirs = (norm(shape[-1], eps=1e-5, dtype=dtype) for norm in (RMSNorm, nn.RMSNorm))
    with torch.no_grad():
        ours.weight.copy_(torch.rand(shape[-1]) + 0.5)
        theirs.weight.copy_(ours.weight)
    exact = copy.deepcopy(theirs).double()
    for norm in (ours, theirs, exact):
        norm.requires_grad_(False)
    x, weight = torch.randn(shape).to(dtype) * 3, torch.randn(shape).to(dtype)
    found = []
    for norm in (ours, theirs, exact):
        mine = x.to(norm.weight.dtype).requires_grad_()
        out = norm(mine)
        found.append((out.detach(), torch.autograd.grad(out, mine, weight.to(out.dtype))[0]))
    (our_out, our_grad), (their_out, their_grad), (_, exact_grad) = found
    assert torch.equal(our_out, their_out)
    ours_off, theirs_off = (float((g.double() - exact_grad).norm()) for g in (our_grad, their_grad))
    assert ours_off <= 1.1 * theirs_off + 1e-3 * float(exact_grad.norm())


def test_the_light_path_keeps_nothing_wide_and_is_only_taken_where_it_is_true():
    kept = []

    def names(norm, x):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            return type(norm(x).grad_fn).__name__

    norm = RMSNorm(32, eps=1e-5, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(4, 32).bfloat16().requires_grad_()
    assert names(norm, x) == "_FrozenBackward"
    assert all(t.dtype == torch.bfloat16 or t.numel() == 4 for t in kept)
    assert names(norm.requires_grad_(True), x) != "_FrozenBackward"
    wide = RMSNorm(32, eps=1e-5).requires_grad_(False)
    assert names(wide, torch.randn(4, 32, requires_grad=True)) != "_FrozenBackward"
