"""Linear attention against loops over its formula, chunked against quadratic, recurrent against whole."""

from __future__ import annotations

import pytest
import torch
from tests.parts.attention.test_tiled import Largest
from torch.autograd import gradcheck, gradgradcheck

from volvelle.parts.attention import linear
from volvelle.parts.attention.linear import LinearAttention, LinearState, elu_plus_one, linear_attention
from volvelle.parts.position.rope import RotaryEmbedding


def inputs(b=2, h=3, n=11, d=6, d_v=4, dtype=torch.float64, h_kv=None):
    generator = torch.Generator().manual_seed(0)
    sizes = ((h, d), (h_kv or h, d), (h_kv or h, d_v))
    return tuple(torch.randn(b, g, n, m, generator=generator, dtype=torch.float64).to(dtype) for g, m in sizes)


def turned(n, d=6):
    return RotaryEmbedding(d).rotation(torch.arange(n), torch.float64)


def oracle(q, k, v, seen, rotation=None, eps=1e-6):
    """Equation 19 of RoFormer, one query and one key at a time; seen (b, n_q, n_k) says which pairs meet."""
    q, k = elu_plus_one(q), elu_plus_one(k)
    turned_q, turned_k = (q, k) if rotation is None else rotation(q, k)
    (b, h, n, _), out = q.shape, torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    group = h // k.shape[1]
    for ib in range(b):
        for ih in range(h):
            for i in range(n):
                above, below = torch.zeros(v.shape[3], dtype=torch.float64), eps
                for j in range(k.shape[2]):
                    if seen[ib, i, j]:
                        above = above + (turned_q[ib, ih, i] @ turned_k[ib, ih // group, j]) * v[ib, ih // group, j]
                        below = below + q[ib, ih, i] @ k[ib, ih // group, j]
                out[ib, ih, i] = above / below
    return out


def lower(n, b=2):
    return torch.ones(b, n, n, dtype=torch.bool).tril()


def real_tokens(n=11):
    return torch.rand(2, n, generator=torch.Generator().manual_seed(1)) < 0.7


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 4, 128])
def test_the_formula(causal, rotary, masked, chunk):
    q, k, v = inputs()
    rotation, mask = turned(11) if rotary else None, real_tokens() if masked else None
    out = linear_attention(q, k, v, causal=causal, rotation=rotation, mask=mask, chunk=chunk)
    seen = lower(11) if causal else torch.ones(2, 11, 11, dtype=torch.bool)
    expected = oracle(q, k, v, seen & (True if mask is None else mask[:, None]), rotation)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
def test_groups_of_queries_share_their_keys(causal):
    q, k, v = inputs(h=6, h_kv=2)
    rotation, mask = turned(11), real_tokens()
    out = linear_attention(q, k, v, causal=causal, rotation=rotation, mask=mask, chunk=4)
    seen = (lower(11) if causal else torch.ones(2, 11, 11, dtype=torch.bool)) & mask[:, None]
    torch.testing.assert_close(out, oracle(q, k, v, seen, rotation), rtol=0, atol=1e-13)
    _, after = linear_attention(q, k, v, rotation=rotation, state=LinearState.empty(2, 2, 6, 4, torch.float64))
    assert (after.s.shape, after.z.shape) == ((2, 2, 6, 4), (2, 2, 6))


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 128])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_segments_side_by_side_see_themselves_only(chunk, shared, masked):
    """Segments that end inside a chunk, at its border, and that last over several chunks."""
    q, k, v = inputs(h=4, h_kv=2)
    segments = torch.tensor([[3] * 4 + [1] * 1 + [7] * 6, [0] * 2 + [1] * 7 + [2] * 2])
    segments = segments[:1] if shared else segments
    mask = real_tokens() if masked else None
    out = linear_attention(q, k, v, causal=True, rotation=turned(11), segments=segments, mask=mask, chunk=chunk)
    seen = lower(11) & (segments[:, :, None] == segments[:, None]) & (True if mask is None else mask[:, None])
    torch.testing.assert_close(out, oracle(q, k, v, seen, turned(11)), rtol=0, atol=1e-13)


def test_a_mask_of_pairs_stands_in_the_place_of_causal_order():
    q, k, v = inputs()
    tree = torch.rand(2, 11, 11, generator=torch.Generator().manual_seed(2)) < 0.4
    out = linear_attention(q, k, v, rotation=turned(11), mask=tree)
    torch.testing.assert_close(out, oracle(q, k, v, tree, turned(11)), rtol=0, atol=1e-13)
    shared = linear_attention(q, k, v, causal=True, rotation=turned(11), mask=tree[:1])
    torch.testing.assert_close(shared, oracle(q, k, v, tree[[0, 0]], turned(11)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("parts", [[11], [1] * 11, [4, 1, 6]])
@pytest.mark.parametrize("h_kv", [3, 1])
def test_a_text_in_parts_equals_the_whole(parts, h_kv):
    q, k, v = inputs(h_kv=h_kv)
    encoding = RotaryEmbedding(6)
    whole = linear_attention(q, k, v, causal=True, rotation=turned(11), chunk=3)
    state, at, rows = LinearState.empty(2, h_kv, 6, 4, torch.float64), 0, []
    for n in parts:
        rotation = encoding.rotation(torch.arange(at, at + n), torch.float64)
        piece = [x[:, :, at : at + n] for x in (q, k, v)]
        expected = state.after(*piece[1:], rotation=rotation)
        out, state = linear_attention(*piece, rotation=rotation, state=state, chunk=3)
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-13)
        rows.append(out)
        at += n
    torch.testing.assert_close(torch.cat(rows, 2), whole, rtol=0, atol=1e-13)
    assert sum(x.numel() for x in state) == 2 * h_kv * 6 * (4 + 1)


def test_a_state_takes_in_any_selection_and_a_tree_sees_it():
    """The state behind some tokens, and then pairs by a mask: as if only those tokens had been there."""
    q, k, v = inputs()
    rotation, encoding = turned(11), RotaryEmbedding(6)
    kept = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0]], dtype=torch.bool)
    first = encoding.rotation(torch.arange(5), torch.float64)
    state = LinearState.empty(2, 3, 6, 4, torch.float64).after(k[:, :, :5], v[:, :, :5], rotation=first, mask=kept)
    tree = lower(6) & (torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(3)) < 0.6)
    last = encoding.rotation(torch.arange(5, 11), torch.float64)
    out, _ = linear_attention(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], rotation=last, mask=tree, state=state)
    seen = torch.cat((kept[:, None].expand(2, 6, 5), tree), -1)
    everything = torch.cat((torch.zeros(2, 5, 11, dtype=torch.bool), seen), 1)
    torch.testing.assert_close(out, oracle(q, k, v, everything, rotation)[:, :, 5:], rtol=0, atol=1e-13)


def test_the_numerator_alone_is_relative():
    """Shifting all positions changes nothing."""
    q, k, v = inputs()
    encoding = RotaryEmbedding(6)
    outs = [
        linear_attention(q, k, v, causal=True, rotation=encoding.rotation(torch.arange(s, s + 11), torch.float64))
        for s in (0, 1000)
    ]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["causal", "segments", "pairs"])
def test_first_and_second_derivatives(kind):
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 4, 4, 2, h_kv=1))
    options = {
        "causal": {"causal": True},
        "segments": {"causal": True, "segments": torch.tensor([[0, 1, 1, 1]])},
        "pairs": {"mask": lower(4, 1)},
    }[kind]

    def call(q, k, v):
        return linear_attention(q, k, v, rotation=turned(4, 4), chunk=3, **options)

    assert gradcheck(call, (q, k, v))
    assert gradgradcheck(call, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    q, k, v = inputs(dtype=dtype)
    out = linear_attention(q, k, v, causal=True)
    assert out.dtype == dtype
    expected = oracle(q.double(), k.double(), v.double(), lower(11))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5 * torch.finfo(dtype).eps)


def test_nothing_and_strangers():
    q, k, v = inputs(n=0)
    assert linear_attention(q, k, v, causal=True).shape == (2, 3, 0, 4)
    q, k, v = inputs()
    mask, segments = torch.zeros(2, 11, dtype=torch.bool), torch.zeros(2, 11, dtype=torch.long)
    assert (linear_attention(q, k, v, mask=mask) == 0).all()
    assert (linear_attention(q, k, v, mask=lower(11) & False) == 0).all()
    state = LinearState.empty(2, 3, 6, 4, torch.float64)
    for bad, said in (
        ({"q": q[0]}, r"q must have shape \(b, h, n, d\)"),
        ({"k": k[..., :3]}, "must agree"),
        ({"k": k[:, :2], "v": v[:, :2]}, "3 heads of q must be a multiple of the 2 heads"),
        ({"q": q[:, :, :4], "causal": True}, "as many queries as keys"),
        ({"mask": mask[:, :3]}, r"mask must be bool \(b, n_k\)"),
        ({"mask": segments}, r"mask must be bool \(b, n_k\)"),
        ({"mask": lower(10)}, r"mask must be bool \(b, n_k\) or \(b, n_q, n_k\)"),
        ({"segments": segments}, "segments go with causal order"),
        ({"segments": segments, "state": state}, "segments go with causal order"),
        ({"segments": segments, "causal": True, "mask": lower(11)}, "no mask of pairs"),
        ({"segments": segments[:, :4], "causal": True}, r"segments must be integers \(b or 1, n\)"),
        ({"segments": mask.double(), "causal": True}, r"segments must be integers \(b or 1, n\)"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            linear_attention(**({"q": q, "k": k, "v": v} | bad))


def test_the_module_turns_by_its_encoding():
    q, k, v = inputs(dtype=torch.float32)
    module = LinearAttention(causal=True, position=RotaryEmbedding(6))
    rotation = RotaryEmbedding(6).rotation(torch.arange(11), torch.float32)
    segments = torch.arange(11)[None] // 4
    assert torch.equal(module(q, k, v), linear_attention(q, k, v, causal=True, rotation=rotation))
    packed = linear_attention(q, k, v, causal=True, rotation=rotation, segments=segments)
    assert torch.equal(module(q, k, v, segments=segments), packed)
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
        return source(*(both._replace(turned=both.turned.as_subclass(Fake)) for both in (queries, keys)), *rest)

    monkeypatch.setattr(linear, "_causal", mutated)
    bad = linear_attention(q, k, v, causal=True, chunk=4).as_subclass(torch.Tensor)
    assert not torch.allclose(bad, good)


@pytest.mark.parametrize("kind", ["causal", "segments", "padding"])
def test_no_square_tensor_ever_exists(kind):
    """Forward and backward: nothing larger than a few times the input, d_v numbers a chunk's row included."""
    b, h, n, d, chunk = 1, 2, 512, 4, 16
    q, k, v = (x.requires_grad_() for x in inputs(b, h, n, d, d))
    numbers = torch.arange(n)[None]
    options = {"causal": {}, "segments": {"segments": numbers // 100}, "padding": {"mask": numbers > 9}}[kind]
    with Largest() as watch:
        out = linear_attention(q, k, v, causal=True, rotation=turned(n, d), chunk=chunk, **options)
        torch.autograd.grad(out.sum(), (q, k, v))
    assert watch.numbers <= 8 * b * h * n * d < b * n * n
