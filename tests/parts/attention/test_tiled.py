"""The tiled back end, with tiles of a few scores, against the written-out formula, in values, gradients and memory."""

from __future__ import annotations

import pytest
import torch
from tests.parts.attention.test_attention import KINDS, SHAPES, Distances, oracle, random_mask, tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from volvelle.parts.attention import tiled, tiled_terms, tiles
from volvelle.parts.attention.attention import attention
from volvelle.parts.position.encoding import Bias, DistanceBias


@pytest.fixture(params=[1, 3, 4, "3, bounded"])
def side(request, monkeypatch):
    """Tiles of `side` queries and keys; with the running maximum, and without where the scores are small enough."""
    found = int(str(request.param)[0])
    set_side(monkeypatch, found)
    monkeypatch.setattr(tiled, "MOST", 1000.0 if "bounded" in str(request.param) else -1.0)
    return found


def set_side(monkeypatch, side):
    monkeypatch.setattr(tiles, "SMALLEST", side)
    monkeypatch.setattr(tiles, "LARGEST", side)


class ByDistance(DistanceBias):
    """A learnable number per distance (clipped) and head."""

    def __init__(self, table):
        self.table, self.learnable = table, table.requires_grad

    def at(self, distance, dtype):
        return self.table.to(dtype)[:, distance.clamp(-4, 4) + 4]


class FromQueries(Bias):
    """A term that depends on q, on k and on two tables, one of them not a leaf; with values as Shaw's."""

    has_value_term = True

    def __init__(self, keys, values):
        self.keys, self.values = keys * 2, values

    def tile(self, q, k, q_positions, k_positions):
        at = Distances.distance(q_positions, k_positions)
        group = q.shape[1] // k.shape[1]
        score = torch.einsum("bhid,ijd->bhij", q, self.keys[at])
        return score + torch.einsum("bhjd,ijd->bhij", k.repeat_interleave(group, 1).sin(), self.keys[at])

    def value_term(self, weights, q_positions, k_positions):
        return torch.einsum("bhij,ijd->bhid", weights, self.values[Distances.distance(q_positions, k_positions)])


def leaf(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()


def by_table(b, h, n_q, n_k, d):
    table = leaf(h, 7)
    return {"bias": Distances(table)}, [table]


def by_distance(b, h, n_q, n_k, d):
    table = leaf(h, 9)
    return {"bias": ByDistance(table), "causal": True}, [table]


def by_distance_of_all_heads(b, h, n_q, n_k, d):
    table = leaf(1, 9)
    return {"bias": ByDistance(table), "mask": random_mask(b, 1, 1, n_k), "window": (2, 3)}, [table]


def from_queries(b, h, n_q, n_k, d):
    keys, values = leaf(7, d), leaf(7, d)
    return {"bias": FromQueries(keys, values), "causal": True}, [keys, values]


def dense(b, h, n_q, n_k, d):
    bias = leaf(h, n_q, n_k)
    return {"bias": bias, "mask": random_mask(b, 1, n_q, n_k)}, [bias]


def one_row(b, h, n_q, n_k, d):
    bias = leaf(b, 1, 1, n_k)
    return {"bias": bias}, [bias]


CALLS = {
    "window": lambda *s: ({"window": (2, 1)}, []),
    "window, causal": lambda *s: ({"window": (2, None), "causal": True}, []),
    "window of one": lambda *s: ({"window": (0, 0)}, []),
    "dropout": lambda *s: ({"dropout": 0.4}, []),
    "dropout, causal, distance": lambda *s: (
        by_distance(*s)[0] | {"dropout": 0.3},
        [],
    ),
    "dense learnable": dense,
    "learnable by key": one_row,
    "table": by_table,
    "distance": by_distance,
    "distance, window, mask": by_distance_of_all_heads,
    "from q and k, with values": from_queries,
} | {name: (lambda b, h, n_q, n_k, d, kind=kind: (kind(b, h, n_q, n_k), [])) for name, kind in KINDS.items()}


def both(call, shape, **more):
    """(output, lse, gradients) of the tiled back end and of the reference; the same dropout for both."""
    b, h, _, n_q, n_k, d = SHAPES[shape]
    return both_of(SHAPES[shape], lambda: CALLS[call](b, h, n_q, n_k, d), **more)


def both_of(shape, make, **more):
    """The same for a shape, and a function that makes the options and the leaves besides q, k and v."""
    b, h, h_kv, n_q, n_k, d = shape
    found = []
    for backend in ("tiled", "reference"):
        q, k, v = (x.requires_grad_() for x in tensors(b, h, h_kv, n_q, n_k, d))
        options, extra = make()
        torch.manual_seed(3)
        out, lse = attention(q, k, v, backend=backend, return_lse=True, **options, **more)
        finite = lse.masked_fill(lse == -torch.inf, 0)
        loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() + finite.sin().sum()
        found.append((out, lse, *torch.autograd.grad(loss, (q, k, v, *extra))))
    return found


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", ["square", "grouped", "ragged", "more queries", "one query", "one key"])
def test_values_and_gradients_are_the_references(shape, call, side):
    ours, theirs = both(call, shape)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_the_formula_itself(side):
    q, k, v = tensors(2, 6, 2, 7, 9, 4)
    options = {"mask": random_mask(2, 1, 7, 9), "bias": torch.randn(6, 7, 9).double()}
    out, lse = attention(q, k, v, backend="tiled", return_lse=True, **options)
    torch.testing.assert_close(out, oracle(q, k, v, **options), rtol=0, atol=1e-12)
    whole = (q @ k.repeat_interleave(3, 1).mT * 0.5 + options["bias"]).masked_fill(~options["mask"], -torch.inf)
    torch.testing.assert_close(lse, whole.logsumexp(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("positions", [None, "packed", "jumping"])
def test_positions_other_than_in_steps_are_asked_one_by_one(side, positions):
    table = leaf(2, 9)
    q, k, v = tensors(2, 2, 2, 6, 6, 4)
    where = {
        None: None,
        "packed": torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]]),
        "jumping": torch.tensor([0, 1, 5, 6, 7, 9]),
    }[positions]
    found = []
    for backend in ("tiled", "reference"):
        out = attention(q, k, v, bias=ByDistance(table), q_positions=where, k_positions=where, backend=backend)
        found.append((out, torch.autograd.grad(out.square().sum(), table)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (0, 0), (2, 1), (None, 3), (4, None), (1, 0), (9, 9)])
@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (5, 5), (3, 11), (11, 3), (8, 8)])
def test_tiles_are_exactly_those_that_somebody_sees(n_q, n_k, window, causal):
    whole = tiles.visible(n_q, n_k, causal, window, torch.device("cpu"))
    left, right = window or (None, None)
    for i in range(n_q):
        for j in range(n_k):
            place = i + n_k - n_q
            expected = (left is None or j >= place - left) and (right is None or j <= place + right)
            assert bool(whole[i, j]) == (expected and (not causal or j <= place))
    for side in (1, 2, 3, 4):
        drawn = torch.zeros(n_q, n_k, dtype=torch.bool)
        for i0, i1, row in tiles.tile_rows(n_q, n_k, side, causal, window):
            for tile in row:
                assert (tile.i0, tile.i1) == (i0, i1)
                part = whole[tile.i0 : tile.i1, tile.j0 : tile.j1]
                assert part.all() or tile.partial
                drawn[tile.i0 : tile.i1, tile.j0 : tile.j1] = True
        assert not (whole & ~drawn).any()
        assert int(drawn.sum()) <= int(whole.sum()) + 4 * side * (n_q + n_k)


def test_dropout_is_as_rare_as_asked_and_follows_the_seed(side):
    q, k, v = tensors(2, 3, 3, 40, 50, 4)
    torch.manual_seed(1)
    first = attention(q, k, v, dropout=0.3, backend="tiled")
    assert not torch.equal(first, attention(q, k, v, dropout=0.3, backend="tiled"))
    torch.manual_seed(1)
    assert torch.equal(first, attention(q, k, v, dropout=0.3, backend="tiled"))
    kept = tiles.Dropout(0.3, 7).whole(side, (2, 3, 40, 50), torch.float64, q.device)
    assert abs(float((kept == 0).double().mean()) - 0.3) < 0.02
    torch.testing.assert_close(kept.unique(), torch.tensor([0, 1 / 0.7], dtype=torch.float64), rtol=1e-4, atol=0)
    assert (attention(q, k, v, dropout=1.0, backend="tiled") == 0).all()


def test_dropout_has_the_right_mean():
    q, k, v = tensors(1, 1, 1, 4, 64, 4)
    draws = torch.stack([attention(q, k, v, dropout=0.5) for _ in range(3000)])
    deviation = draws.std(0) / 3000**0.5
    assert ((draws.mean(0) - attention(q, k, v)).abs() < 5 * deviation).all()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("call", ["distance", "dropout", "window", "causal", "from q and k, with values"])
def test_no_square_tensor_ever_exists(call, monkeypatch):
    set_side(monkeypatch, 16)
    b, h, h_kv, n, d = 1, 2, 2, 400, 4
    q, k, v = (x.requires_grad_() for x in tensors(b, h, h_kv, n, n, d))
    options, extra = CALLS[call](b, h, n, n, d)
    with Largest() as watch:
        torch.autograd.grad(attention(q, k, v, backend="tiled", **options).sum(), (q, k, v, *extra))
    assert watch.numbers <= 8 * b * h * n * d
    with Largest() as watch:
        attention(q, k, v, backend="reference", **options)
    assert watch.numbers >= b * h * n * n  # the watch sees what it is there to see


def test_the_same_bits_every_time(side):
    table = leaf(4, 9)
    q, k, v = (x.requires_grad_() for x in tensors(2, 4, 2, 9, 9, 4))

    def run():
        out = attention(q, k, v, bias=ByDistance(table), causal=True, backend="tiled")
        return (out, *torch.autograd.grad(out.square().sum(), (q, k, v, table)))

    assert all(map(torch.equal, run(), run()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_as_exact_as_the_fused_kernel(dtype):
    q, k, v = tensors(2, 4, 2, 100, 130, 16)
    low = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    exact = attention(*(x.detach().double() for x in low), causal=True, backend="reference")
    errors = {}
    for backend in ("tiled", "sdpa"):
        out = attention(*low, causal=True, backend=backend)
        assert out.dtype == dtype
        errors[backend] = float((out.detach().double() - exact).abs().max())
        assert all(g.dtype == dtype for g in torch.autograd.grad(out.float().sum(), low))
    assert errors["tiled"] <= 2 * errors["sdpa"]


def test_huge_and_nan_scores():
    q, k, v = tensors(1, 1, 1, 5, 6, 4, dtype=torch.float32)
    out = attention(q * 1e4, k * 1e4, v, backend="tiled")
    torch.testing.assert_close(out, attention(q * 1e4, k * 1e4, v, backend="reference"))
    q[0, 0, 2] = torch.nan
    out = attention(q, k, v, backend="tiled")
    assert out[0, 0, 2].isnan().all()
    assert out[0, 0, [0, 1, 3, 4]].isfinite().all()


def test_nothing_to_do():
    q, k, v = (x.requires_grad_() for x in tensors(2, 4, 2, 0, 5, 8))
    out = attention(q, k, v, backend="tiled", causal=True)
    assert out.shape == (2, 4, 0, 8)
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    q, k, v = tensors(0, 4, 2, 3, 5, 8)
    assert attention(q, k, v, backend="tiled").shape == (0, 4, 3, 8)


def test_a_second_derivative_is_refused_by_name():
    q, k, v = (x.requires_grad_() for x in tensors(1, 1, 1, 3, 3, 4))
    with pytest.raises(RuntimeError, match="no second derivative; pass derivatives=2"):
        torch.autograd.grad(attention(q, k, v, backend="tiled").sum(), q, create_graph=True)


def test_a_bias_that_changed_before_the_backward_pass_is_noticed():
    q, k, v = (x.requires_grad_() for x in tensors(1, 1, 1, 3, 3, 4))
    bias = torch.zeros(3, 3, dtype=torch.float64)
    out = attention(q, k, v, bias=bias, backend="tiled")
    bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_auto_takes_tiles_where_the_fused_kernel_would_hold_everything():
    q, k, v = (x.requires_grad_() for x in tensors(1, 1, 1, 200, 200, 4))
    bias = torch.zeros(200, 200, dtype=torch.float64)
    assert attention(q, k, v, bias=bias, explain=True)[1].backend == "sdpa"
    bias.requires_grad_()
    why = attention(q, k, v, bias=bias, explain=True)[1]
    assert why.backend == "tiled"
    assert "needs a gradient" in why.rejected["sdpa"]
    with torch.no_grad():
        assert attention(q, k, v, bias=bias, explain=True)[1].backend == "sdpa"
    assert attention(q, k, v, dropout=0.1, explain=True)[1].backend == "tiled"
    assert attention(q, k, v, window=(5, 5), explain=True)[1].backend == "tiled"
    assert attention(q, k, v, return_lse=True, explain=True)[2].backend == "tiled"


@pytest.mark.parametrize("bad", [(1,), (-1, 0), (0, -2)])
def test_a_bad_window_is_named(bad):
    q, k, v = tensors(1, 1, 1, 3, 3, 4)
    with pytest.raises(ValueError, match="attention: window must be"):
        attention(q, k, v, window=bad)
    with pytest.raises(ValueError, match=r"attention: dropout must lie in \[0, 1\], got 1.5"):
        attention(q, k, v, dropout=1.5)


def one_too_far(tile, shift, causal, window, device, original=tiles.seen):
    return original(tile, shift + 1, causal, window, device)


def forgets_the_flip(call, x, ones=False):
    parts = (part.flatten(0, 1).to(call.wide) for part in x.split(call.side, 2))
    return [torch.cat((part, torch.ones_like(part[..., :1])), -1) if ones else part for part in parts]


def sums_the_wrong_diagonals(term, tile):
    begin = tile.i0 + tile.j0
    return slice(begin, begin + tile.i1 - tile.i0 + tile.j1 - tile.j0 - 1)


def all_but_the_last_tile(*arguments, original=tiles.tile_rows):
    return [(i0, i1, row[:-1]) for i0, i1, row in original(*arguments)]


MUTANTS = {
    "causal order is off by one": ("causal", tiled, "seen", one_too_far),
    "keys stay in order": ("distance", tiled._Call, "keys", forgets_the_flip),
    "diagonals are counted the wrong way": ("distance", tiled_terms._Diagonals, "_range", sums_the_wrong_diagonals),
    "dropout is drawn anew": ("dropout", tiles.Dropout, "factors", lambda self, tile, b, h, dtype, device: torch.rand(
        b, h, tile.i1 - tile.i0, tile.j1 - tile.j0, dtype=dtype) * 2),
    "a term's gradient is dropped": ("table", tiled_terms._Computed, "collect", lambda self, *_: (None, None)),
    "the last tile of a row is left out": ("plain", tiled, "tile_rows", all_but_the_last_tile),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant, monkeypatch):
    set_side(monkeypatch, 3)
    call, owner, name, replacement = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, replacement)
    try:
        ours, theirs = both(call, "square")
    except RuntimeError:
        return
    assert not all(torch.allclose(one, other, rtol=1e-9, atol=1e-9) for one, other in zip(ours, theirs, strict=True))
