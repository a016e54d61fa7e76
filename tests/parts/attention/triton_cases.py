"""What the Triton kernels must do, against the written-out formula in fp64. test_triton.py runs this file in a process
of its own: in Triton's interpreter (TRITON_INTERPRET must be set before Triton is imported), or on a CUDA device.
"""

from __future__ import annotations

import pytest
import torch
from tests.parts.attention.test_attention import KINDS, TOLERANCE, Distances, random_mask, tensors
from tests.parts.attention.test_tiled import ByDistance, leaf

from volvelle.parts.attention import triton, triton_launch
from volvelle.parts.attention.attention import Attention, attention
from volvelle.parts.attention.reference import masked_softmax
from volvelle.parts.attention.tiles import Dropout, visible
from volvelle.parts.attention.triton import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
TIMES = 1 if INTERPRETED else 9  # tiles on a device are larger than the 16 x 16 of the interpreter

# b, h, h_kv, n_q, n_k, d
SHAPES = {
    "square": (1, 2, 2, 37, 37, 8),
    "grouped": (2, 4, 2, 17, 20, 5),
    "more queries": (2, 2, 1, 33, 18, 16),
    "one query": (2, 4, 2, 1, 35, 8),
    "one key": (2, 2, 1, 17, 1, 4),
    "wide": (1, 1, 1, 17, 18, 200),
}


def by_distance(b, h, n_q, n_k):
    table = leaf(h, 9)
    return {"bias": ByDistance(table), "causal": True}, [table]


def by_distance_of_all_heads(b, h, n_q, n_k):
    table = leaf(1, 9)
    return {"bias": ByDistance(table), "mask": random_mask(b, 1, 1, n_k), "window": (2, 19)}, [table]


def learnable(*axes):
    """A bias with only these of its four axes."""

    def make(*sizes):
        bias = leaf(*(size if axis in axes else 1 for axis, size in enumerate(sizes)))
        return {"bias": bias, "causal": True, "mask": random_mask(sizes[0], 1, *sizes[2:])}, [bias]

    return make


def packed(b, h, n_q, n_k):
    """Documents of other lengths in each row."""
    of_keys = torch.stack([torch.arange(n_k).floor_divide(7 + 5 * row) for row in range(b)])
    of_queries = torch.stack([torch.arange(n_k - n_q, n_k).floor_divide(7 + 5 * row) for row in range(b)])
    return {"segments": (of_queries, of_keys), "causal": True}, []


def far_away(b, h, n_q, n_k):
    """Positions that count up by one, but from somewhere else than the queries stand."""
    table = leaf(h, 9)
    where = {"q_positions": torch.arange(3, 3 + n_q), "k_positions": torch.arange(n_k) + 5}
    return {"bias": ByDistance(table), **where}, [table]


CALLS = {
    "window": lambda *s: ({"window": (18, 3)}, []),
    "window, causal": lambda *s: ({"window": (5, None), "causal": True}, []),
    "window of one": lambda *s: ({"window": (0, 0)}, []),
    "window to the right": lambda *s: ({"window": (None, 2)}, []),
    "learnable": learnable(0, 1, 2, 3),
    "learnable for all rows": learnable(1, 2, 3),
    "learnable by key": learnable(0, 3),
    "learnable by query": learnable(1, 2),
    "one learnable number": learnable(),
    "distance": by_distance,
    "distance, window, mask": by_distance_of_all_heads,
    "distance, far away": far_away,
    "packed": packed,
} | {name: (lambda *s, kind=kind: (kind(*s), [])) for name, kind in KINDS.items()}


def on_device(x):
    if isinstance(x, ByDistance):
        return ByDistance(on_device(x.table))
    if isinstance(x, tuple):
        return tuple(map(on_device, x))
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def both(call, shape, dtype=torch.float32):
    """(output, lse, gradients) of the kernels, and of the reference in fp64 from the same rounded inputs."""
    b, h, h_kv, n_q, n_k, d = SHAPES[shape]
    n_q, n_k = (n if n == 1 else n * TIMES for n in (n_q, n_k))
    options, extra = CALLS[call](b, h, n_q, n_k)
    options = {name: on_device(x) for name, x in options.items()}
    found = []
    for backend, wide in (("triton", dtype), ("reference", torch.float64)):
        q, k, v = (x.to(dtype).to(DEVICE, wide).requires_grad_() for x in tensors(b, h, h_kv, n_q, n_k, d, d_v=d + 3))
        out, lse = attention(q, k, v, backend=backend, return_lse=True, **options)
        finite = lse.masked_fill(lse == -torch.inf, 0)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=DEVICE).view_as(out)
        loss = (out.double() * weight).sum() + finite.double().sin().sum()
        found.append((out, lse, *torch.autograd.grad(loss, (q, k, v, *extra))))
        assert out.dtype == wide
    return found


def close(ours, theirs, dtype=torch.float32):
    """Whether every tensor agrees as well as the other back ends do."""
    return all(
        one.shape == exact.shape
        and torch.equal(one.isinf(), exact.isinf())
        and one.masked_fill(exact.isinf(), 0).isfinite().all()
        and (one.double() - exact).masked_fill(exact.isinf(), 0).abs().max()
        <= TOLERANCE[dtype] * max(1.0, exact.masked_fill(exact.isinf(), 0).abs().max().item())
        for one, exact in zip(ours, theirs, strict=True)
    )


@pytest.fixture(autouse=True, scope="module")
def quick():
    """The interpreter looks through the whole language whenever a kernel calls a helper: once a launch is enough."""
    if INTERPRETED:
        from triton.runtime import interpreter

        with pytest.MonkeyPatch.context() as patch:
            speed_up(interpreter, patch)
            yield
    else:
        yield


def speed_up(interpreter, patch):
    known, prepare, restore = set(), interpreter._patch_lang, interpreter._LangPatchScope.restore

    def once(fn):
        if id(fn.__globals__) in known:
            return interpreter._LangPatchScope()
        known.add(id(fn.__globals__))
        return prepare(fn)

    def anew(scope):
        known.clear()
        restore(scope)

    patch.setattr(interpreter, "_patch_lang", once)
    patch.setattr(interpreter._LangPatchScope, "restore", anew)


@pytest.mark.parametrize("call", CALLS)
def test_values_and_gradients_are_the_references(call):
    assert close(*both(call, "square"))


@pytest.mark.parametrize("call", ["window, causal", "distance"])
@pytest.mark.parametrize("shape", ["grouped", "more queries"])
def test_other_shapes(shape, call):
    assert close(*both(call, shape))


@pytest.mark.parametrize("call", ["causal", "distance"])
def test_wide_heads(call):
    assert close(*both(call, "wide"))


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", ["grouped", "more queries", "one query", "one key"])
def test_every_call_in_every_shape(shape, call):
    assert close(*both(call, shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", ["causal", "distance", "bias, mask, causal"])
def test_half_types(call, dtype):
    assert close(*both(call, "more queries", dtype), dtype)


@pytest.mark.parametrize("sides", [(32, 16), pytest.param((16, 32), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "call", ["causal", "packed", *(pytest.param(call, marks=pytest.mark.slow) for call in ("window", "window of one"))]
)
def test_tiles_need_not_be_square(call, sides, monkeypatch):
    sizes = tuple(side * TIMES if INTERPRETED else 2 * side for side in sides)
    square = triton_launch.Blocks(16, 16, 4, 1)
    other = triton_launch.Blocks(*sizes, 4, 1)
    monkeypatch.setattr(triton_launch, "_blocks", lambda kind, *_: square if kind is triton_launch.BIAS else other)
    assert close(*both(call, "square"))


@pytest.mark.parametrize("bias", [None, "learnable", "distance"])
def test_a_query_that_sees_nothing_gives_zero_with_zero_gradient(bias):
    q, k, v = (x.to(DEVICE).requires_grad_() for x in tensors(2, 4, 2, 19, 21, 8, dtype=torch.float32))
    mask = torch.ones(2, 1, 19, 21, dtype=torch.bool, device=DEVICE)
    mask[0, :, 3] = False
    table = leaf(4, 19, 21) if bias == "learnable" else leaf(4, 9)
    given = {None: None, "learnable": on_device(table), "distance": on_device(ByDistance(table))}[bias]
    out, lse = attention(q, k, v, mask=mask, bias=given, backend="triton", return_lse=True)
    assert (out[0, :, 3] == 0).all()
    assert (lse[0, :, 3] == -torch.inf).all()
    assert (out[0, :, 4] != 0).all()
    grads = torch.autograd.grad(out.square().sum(), (q, k, v) + (() if bias is None else (table,)))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][0, :, 3] == 0).all()


def murmur(x):
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ x >> shift) * factor) & 0xFFFFFFFF
    return x ^ x >> 16


def drawn(p, seed, b, h, n_q, n_k):
    """What dropout multiplies the weights by, written out: (b, h, n_q, n_k)."""
    seed = 2 * seed + 3
    pair, i, j = torch.arange(b * h).view(b, h, 1, 1), torch.arange(n_q).view(n_q, 1), torch.arange(n_k)
    rows = murmur(murmur(pair ^ (seed & 0xFFFFFFFF)) ^ i)
    bits = murmur(rows ^ murmur(j ^ seed >> 32)) >> 8
    limit = round(p * 2**24)
    return (bits >= limit).double() * (2**24 / (2**24 - limit))


@pytest.mark.parametrize(
    "call",
    ["distance", "learnable", *(pytest.param(call, marks=pytest.mark.slow) for call in ("plain", "window, causal"))],
)
def test_dropout_in_values_and_gradients(call, monkeypatch):
    b, h, _, n_q, n_k, d = SHAPES["square"]
    seed = 3 * 2**40 + 12345
    monkeypatch.setattr(Dropout, "draw", classmethod(lambda cls, p: cls(p, seed)))
    options, extra = CALLS[call](b, h, n_q, n_k)
    q, k, v = (x.to(DEVICE, torch.float32).requires_grad_() for x in tensors(b, h, h, n_q, n_k, d))
    on = {name: on_device(x) for name, x in options.items()}
    ours = attention(q, k, v, dropout=0.3, backend="triton", **on)
    weight = torch.linspace(-1, 1, ours.numel(), device=DEVICE).view_as(ours)
    ours = (ours, *torch.autograd.grad(ours, (q, k, v, *extra), weight))

    q, k, v = (x.detach().double().cpu().requires_grad_() for x in (q, k, v))
    scores = q @ k.mT * d**-0.5
    bias = options.get("bias")
    if isinstance(bias, ByDistance):
        scores = scores + bias.tile(q, k, torch.arange(n_q), torch.arange(n_k))
    elif bias is not None:
        scores = scores + bias
    seen = visible(n_q, n_k, options.get("causal", False), options.get("window"), q.device)
    seen = seen & options.get("mask", torch.ones(1, dtype=torch.bool))
    weights = masked_softmax(scores, seen) * drawn(0.3, seed, b, h, n_q, n_k)
    exact = weights @ v
    exact = (exact, *torch.autograd.grad(exact, (q, k, v, *extra), weight.double().cpu()))
    assert close([x.cpu() for x in ours], exact)


def test_dropout_is_as_rare_as_asked_and_follows_the_seed(monkeypatch):
    q, k, _ = (x.to(DEVICE) for x in tensors(2, 2, 2, 40, 64, 4, dtype=torch.float32))
    v = torch.eye(64, device=DEVICE).expand(2, 2, 64, 64)  # the output is the weights
    torch.manual_seed(1)
    first = attention(q, k, v, dropout=0.3, backend="triton")
    assert not torch.equal(first, attention(q, k, v, dropout=0.3, backend="triton"))
    blocks = triton_launch.Blocks(32, 32, 4, 1)
    monkeypatch.setattr(triton_launch, "_blocks", lambda *_: blocks)
    torch.manual_seed(1)
    again = attention(q, k, v, dropout=0.3, backend="triton")
    assert torch.equal(first == 0, again == 0)  # other tiles, the same draws
    gone = (first == 0).double()
    assert abs(float(gone.mean()) - 0.3) < 4 * (0.21 / gone.numel()) ** 0.5
    for axes in ((0, 1, 2), (0, 1, 3), (2, 3)):  # no key, query or head is spared
        share = gone.mean(axes)
        assert (share - 0.3).abs().max() < 5 * (0.21 * share.numel() / gone.numel()) ** 0.5
    plain = attention(q, k, v, backend="triton")
    torch.testing.assert_close(first, plain * (first != 0) / 0.7, rtol=1e-5, atol=1e-6)
    assert (attention(q, k, v, dropout=1.0, backend="triton") == 0).all()


def test_the_same_bits_every_time():
    table, bias = leaf(2, 9), leaf(1, 1, 20, 20)
    q, k, v = (x.to(DEVICE).requires_grad_() for x in tensors(2, 2, 1, 20, 20, 4, dtype=torch.float32))

    def run(bias, leaf):
        torch.manual_seed(2)
        out = attention(q, k, v, bias=on_device(bias), causal=True, dropout=0.2, backend="triton")
        return (out, *torch.autograd.grad(out.square().sum(), (q, k, v, leaf)))

    assert all(map(torch.equal, run(bias, bias), run(bias, bias)))
    assert all(map(torch.equal, run(ByDistance(table), table), run(ByDistance(table), table)))


def test_strided_views_and_expanded_tensors_give_the_same():
    q, k, v = (x.to(DEVICE) for x in tensors(2, 4, 2, 18, 20, 8, dtype=torch.float32))
    buffer = torch.zeros(2, 2, 40, 8, device=DEVICE)
    buffer[:, :, :20] = k
    expected = attention(q, k, v, backend="triton")
    q_view, v_view = q.transpose(1, 2).contiguous().transpose(1, 2), v.mT.contiguous().mT
    assert torch.equal(attention(q_view, buffer[:, :, :20], v_view, backend="triton"), expected)
    shared = k[:, :1].expand(2, 2, 20, 8)
    assert torch.equal(
        attention(q, shared, v, backend="triton"), attention(q, shared.contiguous(), v, backend="triton")
    )


def test_nothing_to_do():
    q, k, v = (x.to(DEVICE).requires_grad_() for x in tensors(2, 4, 2, 0, 5, 8, dtype=torch.float32))
    out = attention(q, k, v, backend="triton", causal=True)
    assert out.shape == (2, 4, 0, 8)
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    q, k, v = (x.to(DEVICE) for x in tensors(0, 4, 2, 3, 5, 8, dtype=torch.float32))
    assert attention(q, k, v, backend="triton").shape == (0, 4, 3, 8)


def test_huge_and_nan_scores():
    q, k, v = (x.to(DEVICE) for x in tensors(1, 1, 1, 20, 21, 4, dtype=torch.float32))
    out = attention(q * 1e4, k * 1e4, v, backend="triton")
    torch.testing.assert_close(out, attention(q * 1e4, k * 1e4, v, backend="reference"))
    q[0, 0, 2] = torch.nan
    out = attention(q, k, v, backend="triton")
    assert out[0, 0, 2].isnan().all()
    assert out[0, 0, 3:].isfinite().all()


def test_a_bias_of_minus_infinity_hides():
    q, k, v = (x.to(DEVICE) for x in tensors(1, 2, 2, 20, 20, 8, dtype=torch.float32))
    seen = torch.ones(20, 20, dtype=torch.bool, device=DEVICE).tril()
    bias = torch.zeros(20, 20, device=DEVICE).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(
        attention(q, k, v, bias=bias, backend="triton"), attention(q, k, v, causal=True, backend="triton")
    )


def test_autocast_casts_the_inputs():
    q, k, v = (x.to(DEVICE) for x in tensors(2, 4, 2, 18, 18, 8, dtype=torch.float32))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = attention(q, k, v, backend="triton", bias=on_device(ByDistance(leaf(4, 9))))
    assert out.dtype == torch.bfloat16


def test_a_second_derivative_is_refused_by_name():
    q, k, v = (x.to(DEVICE).requires_grad_() for x in tensors(1, 1, 1, 3, 3, 4, dtype=torch.float32))
    with pytest.raises(RuntimeError, match="no second derivative; pass derivatives=2"):
        torch.autograd.grad(attention(q, k, v, backend="triton").sum(), q, create_graph=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bias": Distances(leaf(2, 7))}, "the bias must be asked block by block"),
        (
            {"bias": ByDistance(leaf(2, 9)), "q_positions": torch.tensor([0, 1, 5])},
            "the bias must be asked block by block",
        ),
        ({"bias": Distances(leaf(2, 7), leaf(7, 4))}, "the bias adds a value term"),
    ],
)
def test_what_the_kernels_lack_is_said(options, reason):
    q, k, v = (x.to(DEVICE) for x in tensors(1, 2, 2, 3, 3, 4, dtype=torch.float32))
    with pytest.raises(ValueError, match=f"back end 'triton' cannot serve this call: {reason}"):
        attention(q, k, v, backend="triton", **options)
    with pytest.raises(ValueError, match="float64 would lose digits"):
        attention(q.double(), k.double(), v.double(), backend="triton")
    wide = torch.zeros(1, 2, 3, 257, device=DEVICE)
    with pytest.raises(ValueError, match="wider than 256"):
        attention(wide, wide, wide, backend="triton")


def operator_arguments():
    q, k, v = (x.to(DEVICE).requires_grad_() for x in tensors(2, 2, 1, 5, 6, 8, dtype=torch.float32))
    numbers = leaf(2, 10).detach().float().to(DEVICE).requires_grad_()
    return (q, k, v, None, None, numbers, None, None), {
        "left": None, "right": 0, "scale": 0.3, "dropout": 0.0, "seed": 0,
    }  # fmt: skip


def test_the_operator_tells_torch_the_truth():
    arguments, options = operator_arguments()
    torch.library.opcheck(triton.triton_attention, arguments, options)


@pytest.mark.parametrize("call", ["mask and causal", pytest.param("window", marks=pytest.mark.slow)])
def test_compiled_equals_eager_in_one_graph(call):
    torch.compiler.reset()
    options = {name: on_device(x) for name, x in CALLS[call](2, 4, 7, 9)[0].items()}
    q, k, v = (x.to(DEVICE).requires_grad_() for x in tensors(2, 4, 2, 7, 9, 8, dtype=torch.float32))

    def run(q, k, v):
        return attention(q, k, v, backend="triton", **options)

    found = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        out = function(q, k, v)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(map(torch.equal, *found))


def test_exported_equals_eager():
    q, k, v = (x.to(DEVICE) for x in tensors(2, 4, 2, 6, 6, 8, dtype=torch.float32))
    module = Attention(causal=True, backend="triton")
    assert torch.equal(torch.export.export(module, (q, k, v)).module()(q, k, v), module(q, k, v))
