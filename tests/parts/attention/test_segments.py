"""Packed rows: every text of a row as if it stood alone, in values and gradients, without a mask of all pairs."""

from __future__ import annotations

import pytest
import torch
from tests.parts.attention.test_attention import tensors
from tests.parts.attention.test_tiled import ByDistance, Largest, both_of, leaf, set_side

from volvelle.parts.attention import tiled, tiled_terms
from volvelle.parts.attention.attention import Attention, attention
from volvelle.parts.attention.segments import Segments
from volvelle.parts.attention.spec import Shape, Terms


def numbered(*lengths):
    return torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])


PACKED = torch.stack((numbered(9, 4, 24), numbered(17, 19, 1)))
DIRECT = ("sdpa", "tiled", "reference")


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "window": (4, 0)}, {"bias": "distance"}], ids=str
)
@pytest.mark.parametrize("backend", DIRECT)
def test_packed_equals_separate(backend, options, monkeypatch):
    set_side(monkeypatch, 8)
    q, k, v = (x.requires_grad_() for x in tensors(2, 4, 2, 37, 37, 8))
    table = leaf(4, 9)
    options = {**options, "bias": ByDistance(table)} if "bias" in options else options
    packed = attention(q, k, v, segments=PACKED, backend=backend, **options)
    alone = torch.zeros_like(packed)
    for row, numbers in enumerate(PACKED):
        for number in numbers.unique():
            part = slice(row, row + 1), slice(None), numbers == number
            alone[part] = attention(q[part], k[part], v[part], backend="reference", **options)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)
    weight = torch.linspace(-1, 1, packed.numel(), dtype=torch.float64).view_as(packed)
    leaves = (q, k, v, table) if "bias" in options else (q, k, v)
    found = [torch.autograd.grad((out * weight).sum(), leaves) for out in (packed, alone)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-11)


CALLS = {
    "one for all rows": lambda b, n_q, n_k: {"segments": (numbered(n_q)[None], numbered(3, n_k - 3)[None])},
    "in no order": lambda b, n_q, n_k: {"segments": pair(b, n_q, n_k)},
    "rows of keys only": lambda b, n_q, n_k: {"segments": (pair(1, n_q, n_k)[0], pair(b, n_q, n_k)[1])},
    "causal, dropout": lambda b, n_q, n_k: {"segments": pair(b, n_q, n_k), "causal": True, "dropout": 0.3},
    "mask, window, bias": lambda b, n_q, n_k: {
        "segments": pair(b, n_q, n_k),
        "mask": torch.rand(b, 1, n_q, n_k, generator=torch.Generator().manual_seed(2)) < 0.8,
        "window": (7, 5),
        "bias": torch.linspace(-2, 2, b * n_q * n_k, dtype=torch.float64).view(b, 1, n_q, n_k),
    },
    "nobody meets": lambda b, n_q, n_k: {"segments": (torch.zeros(b, n_q).long(), torch.ones(b, n_k).long())},
}


def pair(b, n_q, n_k):
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randint(0, 4, (b, n), generator=generator) for n in (n_q, n_k))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("sizes", [(3, 11, 13), (2, 13, 11), (2, 1, 9), (1, 8, 8)], ids=str)
@pytest.mark.parametrize("side", [1, 3, 8])
def test_tiles_agree_with_the_formula(call, sizes, side, monkeypatch):
    set_side(monkeypatch, side)
    b, n_q, n_k = sizes
    for one, other in zip(*both_of((b, 4, 2, n_q, n_k, 8), lambda: (CALLS[call](b, n_q, n_k), [])), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_tiles_in_which_nobody_meets_are_not_computed(monkeypatch):
    set_side(monkeypatch, 8)
    computed = []
    original = tiled._Call.scores
    monkeypatch.setattr(
        tiled._Call,
        "scores",
        lambda self, room, rows, columns, tile: computed.append(tile[:4]) or original(self, room, rows, columns, tile),
    )
    q, k, v = tensors(2, 2, 2, 64, 64, 4)
    segments = torch.stack((numbered(16, 16, 16, 16), numbered(64)))
    attention(q, k, v, segments=segments, causal=True, backend="tiled")
    own = [(i, i + 8, j, j + 8) for i in range(0, 64, 8) for j in range(0, i + 8, 8)]
    packed = [tile for tile in own if tile[0] // 16 == tile[2] // 16]
    assert computed == packed + own


def test_no_square_tensor_exists(monkeypatch):
    set_side(monkeypatch, 16)
    n = 400
    q, k, v = (x.requires_grad_() for x in tensors(2, 2, 2, n, n, 4))
    with Largest() as watch:
        segments = torch.stack((numbered(100, 250, 50), numbered(399, 1)))
        torch.autograd.grad(attention(q, k, v, segments=segments, causal=True).sum(), (q, k, v))
    assert watch.numbers <= 2 * 2 * n * 4 * 2


def test_a_bias_by_distance_stays_one_number_a_diagonal_where_positions_restart():
    numbers = numbered(5, 9, 2)[None]
    restarting = torch.cat([torch.arange(n) for n in (5, 9, 2)])
    q, k, _ = tensors(1, 2, 2, 16, 16, 4)
    bias = ByDistance(leaf(2, 9))

    def term(positions, segments):
        terms = Terms(None, bias, True, 1.0, positions, positions, segments=segments)
        return tiled_terms.make_term(terms, q, k, Shape(1, 2, 2, 16, 16, 4, 4), torch.float64)

    segments = Segments.of(numbers, (1, 16, 16))
    assert isinstance(term(restarting, segments), tiled_terms._Diagonals)
    assert isinstance(term(restarting, None), tiled_terms._Computed)
    assert isinstance(term(restarting.flip(0), segments), tiled_terms._Computed)
    # the same number again, further on in the row, but not as far from its own: no one distance on a diagonal
    again = torch.where(numbers == 2, 0, numbers)
    assert isinstance(term(restarting, Segments.of(again, (1, 16, 16))), tiled_terms._Computed)


@pytest.mark.parametrize("positions", ["restarting", "one row for all", "jumping"])
def test_a_bias_at_the_positions_of_packed_texts(positions, monkeypatch):
    set_side(monkeypatch, 8)
    table = leaf(4, 9)
    where = {
        "restarting": torch.cat([torch.arange(n) for n in (9, 4, 24)] + [torch.arange(n) for n in (17, 19, 1)]).view(
            2, 37
        ),
        "one row for all": torch.arange(37),
        "jumping": torch.arange(37) * 2 % 11,
    }[positions]
    options = {
        "segments": PACKED,
        "bias": ByDistance(table),
        "q_positions": where,
        "k_positions": where,
        "causal": True,
    }
    for one, other in zip(*both_of((2, 4, 2, 37, 37, 8), lambda: (options, [table])), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_auto_packs_in_tiles_and_the_fused_kernel_refuses_a_mask_of_all_pairs():
    q, k, v = tensors(1, 1, 1, 200, 200, 4)
    segments = numbered(150, 50)[None]
    assert attention(q, k, v, segments=segments, explain=True)[1].backend == "tiled"
    assert attention(q[:, :, :9], k[:, :, :9], v[:, :, :9], segments=segments[:, :9], explain=True)[1].backend == "sdpa"
    with pytest.raises(ValueError, match=r"back end .sdpa. cannot serve this call: .* a mask of all pairs"):
        attention(q, k, v, segments=segments, backend="sdpa")


def test_the_module_passes_segments_on():
    q, k, v = tensors(2, 4, 2, 37, 37, 8)
    assert torch.equal(
        Attention(causal=True)(q, k, v, segments=PACKED), attention(q, k, v, causal=True, segments=PACKED)
    )


@pytest.mark.parametrize(
    ("segments", "error", "message"),
    [
        (torch.zeros(2, 4).long(), ValueError, r"of the keys must be \(b or 1, n\) = \(2 or 1, 5\), got \(2, 4\)"),
        (torch.zeros(3, 5).long(), ValueError, r"got \(3, 3\)"),
        (torch.zeros(5).long(), ValueError, r"got \(3,\)"),
        (
            (torch.zeros(2, 5).long(), torch.zeros(2, 5).long()),
            ValueError,
            r"of the queries .* \(2 or 1, 3\), got \(2, 5\)",
        ),
        (torch.zeros(2, 5), TypeError, "segments must be integers, got torch.float32"),
        (torch.zeros(2, 5, dtype=torch.bool), TypeError, "segments must be integers, got torch.bool"),
    ],
)
def test_segments_that_do_not_fit_are_named(segments, error, message):
    q, k, v = tensors(2, 4, 2, 3, 5, 8)
    with pytest.raises(error, match=f"attention: segments .*{message}|attention: {message}"):
        attention(q, k, v, segments=segments)


MUTANTS = {
    "whole tiles are taken for hidden ones": (
        "meetings",
        lambda self, side: tuple(x & False for x in MEETINGS(self, side)),
    ),
    "partial tiles are taken for whole ones": ("meetings", lambda self, side: (MEETINGS(self, side)[0],) * 2),
    "a row takes the segments of the first": ("row", lambda self, i: Segments(self.queries[:1], self.keys[:1])),
    "neighbours are the same": ("same", lambda self, *at: SAME(self, *at) | True),
}
MEETINGS, SAME = Segments.meetings, Segments.same


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant, monkeypatch):
    set_side(monkeypatch, 4)
    q, k, v = tensors(2, 4, 2, 37, 37, 8)
    expected = attention(q, k, v, segments=PACKED, causal=True, backend="reference")
    monkeypatch.setattr(Segments, *MUTANTS[mutant])
    found = attention(q, k, v, segments=PACKED, causal=True, backend="tiled")
    assert not torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
