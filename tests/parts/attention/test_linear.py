"""Linear attention against loops over its formula, chunked against quadratic, recurrent against whole."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from volvelle.parts.attention import linear
from volvelle.parts.attention.linear import LinearAttention, LinearState, elu_plus_one, linear_attention
from volvelle.parts.position.rope import RotaryEmbedding


def inputs(b=2, h=3, n=11, d=6, d_v=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(b, h, n, m, generator=generator, dtype=torch.float64).to(dtype) for m in (d, d, d_v))


def turned(q, k, n):
    return RotaryEmbedding(q.shape[-1]).rotation(torch.arange(n), torch.float64)


def oracle(q, k, v, *, causal, rotation=None, mask=None, eps=1e-6):
    """Equation 19 of RoFormer, one query and one key at a time."""
    q, k = elu_plus_one(q), elu_plus_one(k)
    turned_q, turned_k = (q, k) if rotation is None else rotation(q, k)
    (b, h, n, _), out = q.shape, torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for ib in range(b):
        for ih in range(h):
            for i in range(n):
                above, below = torch.zeros(v.shape[3], dtype=torch.float64), eps
                for j in range(i + 1 if causal else k.shape[2]):
                    if mask is None or mask[ib, j]:
                        above = above + (turned_q[ib, ih, i] @ turned_k[ib, ih, j]) * v[ib, ih, j]
                        below = below + q[ib, ih, i] @ k[ib, ih, j]
                out[ib, ih, i] = above / below
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 4, 128])
def test_the_formula(causal, rotary, masked, chunk):
    q, k, v = inputs()
    rotation = turned(q, k, 11) if rotary else None
    mask = torch.rand(2, 11, generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    out = linear_attention(q, k, v, causal=causal, rotation=rotation, mask=mask, chunk=chunk)
    expected = oracle(q, k, v, causal=causal, rotation=rotation, mask=mask)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("parts", [[11], [1] * 11, [4, 1, 6]])
def test_a_text_in_parts_equals_the_whole(parts):
    q, k, v = inputs()
    encoding = RotaryEmbedding(6)
    whole = linear_attention(q, k, v, causal=True, rotation=turned(q, k, 11), chunk=3)
    state, at, rows = LinearState.empty(2, 3, 6, 4, torch.float64), 0, []
    for n in parts:
        rotation = encoding.rotation(torch.arange(at, at + n), torch.float64)
        piece = (x[:, :, at : at + n] for x in (q, k, v))
        out, state = linear_attention(*piece, rotation=rotation, state=state, chunk=3)
        rows.append(out)
        at += n
    torch.testing.assert_close(torch.cat(rows, 2), whole, rtol=0, atol=1e-13)
    assert sum(x.numel() for x in state) == 2 * 3 * 6 * (4 + 1)


def test_the_numerator_alone_is_relative():
    """Shifting all positions changes nothing."""
    q, k, v = inputs()
    encoding = RotaryEmbedding(6)
    outs = [
        linear_attention(q, k, v, causal=True, rotation=encoding.rotation(torch.arange(s, s + 11), torch.float64))
        for s in (0, 1000)
    ]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-9)


def test_first_and_second_derivatives():
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 4, 4, 2))
    rotation = turned(q, k, 4)

    def call(q, k, v):
        return linear_attention(q, k, v, causal=True, rotation=rotation, chunk=3)

    assert gradcheck(call, (q, k, v))
    assert gradgradcheck(call, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    q, k, v = inputs(dtype=dtype)
    out = linear_attention(q, k, v, causal=True)
    assert out.dtype == dtype
    expected = oracle(q.double(), k.double(), v.double(), causal=True)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5 * torch.finfo(dtype).eps)


def test_nothing_and_strangers():
    q, k, v = inputs(n=0)
    assert linear_attention(q, k, v, causal=True).shape == (2, 3, 0, 4)
    q, k, v = inputs()
    mask = torch.zeros(2, 11, dtype=torch.bool)
    assert (linear_attention(q, k, v, mask=mask) == 0).all()
    for bad, said in (
        ({"q": q[0]}, r"q must have shape \(b, h, n, d\)"),
        ({"k": k[..., :3]}, "must agree"),
        ({"q": q[:, :, :4], "causal": True}, "as many queries as keys"),
        ({"mask": mask[:, :3]}, r"mask must be bool \(b, n_k\)"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            linear_attention(**({"q": q, "k": k, "v": v} | bad))


def test_the_module_turns_by_its_encoding():
    q, k, v = inputs(dtype=torch.float32)
    module = LinearAttention(causal=True, position=RotaryEmbedding(6))
    rotation = RotaryEmbedding(6).rotation(torch.arange(11), torch.float32)
    assert torch.equal(module(q, k, v), linear_attention(q, k, v, causal=True, rotation=rotation))
    assert not torch.allclose(module(q, k, v), LinearAttention(causal=True)(q, k, v))


MUTANTS = {
    "the chunk sees its own future": lambda x: x,
    "the chunk does not see itself": lambda x: torch.Tensor.tril(x, -1),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant, monkeypatch):
    source = linear._causal
    q, k, v = inputs()
    good = linear_attention(q, k, v, causal=True, chunk=4)

    class Fake(torch.Tensor):
        def tril(self, diagonal=0):
            return MUTANTS[mutant](self.as_subclass(torch.Tensor))

    def mutated(queries, keys, *rest):
        return source((queries[0], queries[1].as_subclass(Fake)), (keys[0], keys[1].as_subclass(Fake)), *rest)

    monkeypatch.setattr(linear, "_causal", mutated)
    bad = linear_attention(q, k, v, causal=True, chunk=4).as_subclass(torch.Tensor)
    assert not torch.allclose(bad, good)
