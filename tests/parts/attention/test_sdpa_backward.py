"""The own backward pass of bf16 attention on CPUs: as near to fp64 as rounding allows, for every mask and grouping."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from volvelle.parts.attention import sdpa_backward
from volvelle.parts.attention.attention import attention

SIZES = [(2, 4, 4, 5, 16), (1, 6, 2, 130, 64), (3, 9, 3, 257, 64), (2, 2, 1, 300, 40)]  # b, h, h_kv, n, d


def tensors(b, h, h_kv, n, d, *, n_k=None, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    shapes = (b, n, h, d), (b, n_k or n, h_kv, d), (b, n_k or n, h_kv, d)
    # Laid out as a projection gives them: (b, n, h, d), seen as (b, h, n, d).
    return [(scale * torch.randn(s, generator=generator)).bfloat16().transpose(1, 2) for s in shapes]


def gradients(call, inputs, dtype):
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    out = call(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


def compare(inputs, ours, oracle, bound=0.012):
    """Largest error of every gradient over its norm; the output is the kernel's own."""
    found = gradients(ours, inputs, torch.bfloat16)
    exact = gradients(oracle, inputs, torch.float64)
    for a, e in zip(found, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert float((a.double() - e).norm() / e.norm()) < bound


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_causal(size, scale, monkeypatch):
    used = []
    real = sdpa_backward._gradients
    monkeypatch.setattr(sdpa_backward, "_gradients", lambda *a: used.append(1) or real(*a))
    inputs = tensors(*size, scale=scale)
    compare(
        inputs,
        lambda q, k, v: attention(q, k, v, causal=True),
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        bound=0.012 * scale,
    )
    assert used


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("kind", ["padding", "pairs", "heads", "keys"])
def test_masks(size, kind):
    b, h, _, n, _ = size
    generator = torch.Generator().manual_seed(2)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    mask = {
        "padding": (torch.arange(n) < torch.tensor([n, *range(n // 2, n // 2 + b - 1)])[:, None])[:, None, None]
        & causal,
        "pairs": (torch.rand(n, n, generator=generator) < 0.5)[None, None] | torch.eye(n, dtype=torch.bool),
        "heads": (torch.rand(b, h, n, n, generator=generator) < 0.5) | torch.eye(n, dtype=torch.bool),
        "keys": torch.arange(n)[None, None, None] < torch.arange(n - b + 1, n + 1)[:, None, None, None],
    }[kind]
    inputs = tensors(*size)
    compare(
        inputs,
        lambda q, k, v: attention(q, k, v, mask=mask),
        lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
    )


def test_more_keys_than_queries_and_a_scale_of_ones_own():
    inputs = tensors(2, 4, 2, 33, 32, n_k=75)
    mask = torch.ones(1, 1, 33, 75, dtype=torch.bool).tril(42)
    compare(
        inputs,
        lambda q, k, v: attention(q, k, v, causal=True, scale=0.3),
        lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=0.3),
    )


def test_a_query_without_keys_gives_and_takes_nothing():
    q, k, v = tensors(2, 4, 2, 20, 16)
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    mask[1, :, :7] = False
    out, d_q, d_k, d_v = gradients(lambda q, k, v: attention(q, k, v, mask=mask), (q, k, v), torch.bfloat16)
    assert (out[1, :, :7] == 0).all()
    assert (d_q[1, :, :7] == 0).all()
    assert all(torch.isfinite(x).all() for x in (d_q, d_k, d_v))


def test_a_large_score_does_not_overflow():
    inputs = tensors(1, 2, 1, 140, 64, scale=12.0)
    for x in gradients(lambda q, k, v: attention(q, k, v, causal=True), inputs, torch.bfloat16):
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("which", [(0, 1, 2), (0,), (1,), (2,)])
def test_features_that_do_not_lie_side_by_side(which):
    # As a convolution over a map gives them: (b, d, n), seen as (b, 1, n, d).
    inputs = tensors(2, 1, 1, 49, 32)
    inputs = [x.mT.contiguous().mT if i in which else x for i, x in enumerate(inputs)]
    assert any(x.stride(-1) != 1 for x in inputs)
    compare(inputs, lambda *t: attention(*t), lambda *t: scaled_dot_product_attention(*t))
    for ours, plain in zip(
        gradients(attention, inputs, torch.bfloat16),
        gradients(attention, [x.contiguous() for x in inputs], torch.bfloat16),
        strict=True,
    ):
        assert torch.equal(ours, plain)


def test_a_second_derivative_is_refused_and_not_zero():
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 2, 5, 8))
    with pytest.raises(RuntimeError, match="the sdpa back end has no second derivative; pass derivatives=2"):
        torch.autograd.grad(attention(q, k, v, causal=True).sum(), q, create_graph=True)
    (first,) = torch.autograd.grad(attention(q, k, v, causal=True, derivatives=2).sum(), q, create_graph=True)
    assert torch.autograd.grad(first.sum(), q)[0].abs().sum() > 0
