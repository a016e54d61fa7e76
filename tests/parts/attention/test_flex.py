"""FlexAttention as a back end: its block table, its generated kernels, and what it says about itself."""

from __future__ import annotations

import pytest
import torch
from tests.parts.attention.test_attention import TOLERANCE, Distances, random_mask, tensors
from tests.parts.attention.test_tiled import ByDistance, leaf

from volvelle.parts.attention import flex
from volvelle.parts.attention.attention import attention
from volvelle.parts.attention.segments import Segments
from volvelle.parts.attention.spec import Shape, Terms

CPU = torch.device("cpu")
GENERATED = pytest.mark.skipif(flex._no_compiler() is not None, reason=f"no generated kernels: {flex._no_compiler()}")


def numbered(*lengths):
    return torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])


BLOCKS = {
    "causal": lambda q, k: {"causal": True},
    "window": lambda q, k: {"causal": False, "window": (40, 3)},
    "window, causal": lambda q, k: {"causal": True, "window": (200, None)},
    "mask": lambda q, k: {"causal": False, "mask": random_mask(2, 1, q, k) & (torch.arange(k) < k // 2)},
    "mask of keys": lambda q, k: {"causal": False, "mask": (torch.arange(k) >= 130)[None, None, None]},
    "mask of queries": lambda q, k: {"causal": True, "mask": (torch.arange(q) < 128)[:, None]},
    "segments": lambda q, k: {
        "causal": True,
        "segments": (torch.arange(k)[None, -q:].expand(2, -1) // 100, torch.arange(k)[None].expand(2, -1) // 100)
        if q <= k
        else (torch.arange(q)[None] // 100, torch.arange(k)[None] // 100),
    },
}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(("n_q", "n_k"), [(300, 300), (70, 390), (256, 256), (300, 140), (1, 300)])
def test_the_table_of_blocks_holds_what_may_attend(kind, n_q, n_k):
    options = BLOCKS[kind](n_q, n_k)
    segments = options.pop("segments", None)
    shape = Shape(2, 4, 2, n_q, n_k, 8, 8)
    packed = None if segments is None else Segments.of(segments, (2, n_q, n_k))
    terms = Terms(
        options.pop("mask", None), None, options["causal"], 1.0, None, None, options.get("window"), None, packed
    )
    some, every = (x.expand(2, 1, -1, -1) for x in flex._blocks(terms, shape, CPU))
    allowed = terms.allowed(shape, CPU)
    whole = torch.ones(2, 1, n_q, n_k, dtype=torch.bool) if allowed is None else allowed.expand(2, 1, n_q, n_k)
    alone = not (terms.causal and (terms.mask is not None or packed is not None))
    for i in range(some.shape[2]):
        for j in range(some.shape[3]):
            block = whole[:, 0, i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].flatten(1)
            assert (some[:, 0, i, j] | ~block.any(1)).all()
            # Of two things that hide, each may leave a pair of a block, but not the same one.
            assert not alone or torch.equal(some[:, 0, i, j], block.any(1))
            assert torch.equal(every[:, 0, i, j], block.all(1) & (block.shape[1] == 128 * 128))


PACKED = torch.stack((numbered(100, 90, 100), numbered(10, 280)))


def call_of(kind, dtype=torch.float32):
    n_q, n_k = 150, 290
    q, k, v = tensors(2, 4, 2, n_q, n_k, 32, dtype=dtype)
    mask = random_mask(2, 1, n_q, n_k)
    mask[:, :, 5] = False
    places = torch.stack((torch.arange(n_k) % 50, torch.arange(n_k) % 70))
    kinds = {
        "plain": {},
        "causal": {"causal": True},
        "window": {"causal": True, "window": (60, None)},
        "mask": {"mask": mask},
        "mask, bias": {"mask": mask, "bias": torch.linspace(-2, 2, 4 * n_q * n_k).view(4, n_q, n_k)},
        "bias of keys": {"bias": torch.linspace(-2, 2, n_k)},
        "distance, causal": {"causal": True, "bias": ByDistance(leaf(4, 9).detach().float())},
        "distance of all heads": {"bias": ByDistance(leaf(1, 9).detach().float()), "window": (200, 200)},
        "positions": {
            "bias": ByDistance(leaf(4, 9).detach().float()), "q_positions": places[:, -n_q:], "k_positions": places
        },
        "segments": {"causal": True, "segments": PACKED},
        "packed, distance": {
            "causal": True, "segments": PACKED, "bias": ByDistance(leaf(4, 9).detach().float())
        },
        "nobody meets": {"segments": (torch.zeros(1, n_q).long(), torch.ones(1, n_k).long())},
    }  # fmt: skip
    return (q, k, v), kinds[kind]


KINDS = (
    "plain", "causal", "window", "mask", "mask, bias", "bias of keys", "distance, causal", "distance of all heads",
    "positions", "segments", "packed, distance", "nobody meets",
)  # fmt: skip
QUICK = ("packed, distance",)


@GENERATED
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
def test_generated_kernels_agree_with_the_formula(kind):
    for dtype in (torch.float32,) if kind in QUICK else (torch.float32, torch.bfloat16, torch.float16):
        inputs, options = call_of(kind, dtype)
        with torch.no_grad():
            out, why = attention(*inputs, backend="flex", explain=True, **options)
        assert "generated kernel" in why.why
        exact = attention(*(x.double() for x in inputs), backend="reference", **options)
        assert out.dtype == dtype
        assert (out.double() - exact).abs().max() <= TOLERANCE[dtype] * max(1.0, exact.abs().max().item())


@GENERATED
@pytest.mark.slow
def test_other_lengths_share_a_kernel():
    """Also under causal order, whose offset is a number that the kernel reads."""
    from torch._dynamo.utils import counters

    with torch.no_grad():
        for count, n_k in enumerate((300, 333, 410, 505)):
            q, k, v = tensors(1, 2, 2, 200, n_k, 32, dtype=torch.float32)
            ours = attention(q, k, v, causal=True, backend="flex")
            if count == 2:
                graphs = counters["stats"]["unique_graphs"]
            torch.testing.assert_close(ours, attention(q, k, v, causal=True, backend="reference"), rtol=0, atol=2e-6)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("kind", KINDS)
def test_uncompiled_it_agrees_and_says_so(kind, monkeypatch):
    monkeypatch.setattr(flex, "_no_compiler", lambda: "there is no C++ compiler here")
    inputs, options = call_of(kind)
    with torch.no_grad():
        out, lse, why = attention(*inputs, backend="flex", explain=True, return_lse=True, **options)
        same, said = attention(*inputs, backend="flex", explain=True, **options)
    assert "not compiled, all scores at once: the kernel for CPUs does not give the log-sum-exp" in str(why)
    assert said.why.endswith("all scores at once: there is no C++ compiler here")
    exact, exact_lse = attention(*(x.double() for x in inputs), backend="reference", return_lse=True, **options)
    for ours, theirs in ((out, exact), (same, exact), (lse, exact_lse)):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)


def test_fp64_is_computed_in_fp64():
    inputs, options = call_of("mask, bias", torch.float64)
    out, why = attention(*inputs, backend="flex", explain=True, **options)
    assert "the kernel has no fp64" in why.why
    torch.testing.assert_close(out, attention(*inputs, backend="reference", **options), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "FlexAttention has no backward pass on the CPU"),
        ({"dropout": 0.1}, "FlexAttention has no dropout"),
        ({"bias": Distances(torch.zeros(4, 7))}, "the bias is computed from q and k"),
        ({"bias": Distances(torch.zeros(4, 7), torch.zeros(7, 8))}, "the bias adds a value term"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(options, message):
    q, k, v = tensors(2, 4, 2, 3, 5, 8, dtype=torch.float32)
    q.requires_grad_(not options)
    with torch.set_grad_enabled(not options), pytest.raises(ValueError, match=f"back end 'flex' cannot .*: {message}"):
        attention(q, k, v, backend="flex", **options)


def test_inputs_that_could_have_gradients_are_served_where_nobody_asks(monkeypatch):
    monkeypatch.setattr(flex, "uncompiled", lambda *_: "not in this test")
    q, k, v = (x.requires_grad_() for x in tensors(2, 4, 2, 3, 5, 8, dtype=torch.float32))
    bias = torch.zeros(3, 5, requires_grad=True)
    with torch.no_grad():
        out = attention(q, k, v, bias=bias, backend="flex")
        torch.testing.assert_close(out, attention(q, k, v, bias=bias, backend="reference"))


def test_auto_never_takes_it():
    q, k, v = tensors(2, 4, 2, 200, 200, 8, dtype=torch.float32)
    for options in ({}, {"window": (9, 9)}, {"causal": True, "bias": torch.zeros(200, 200)}):
        assert attention(q, k, v, explain=True, **options)[1].backend != "flex"
