"""Caches that let rows begin anew, move their tokens together, and shorten a step: nothing else changes."""

from __future__ import annotations

import pytest
import torch

from volvelle.parts.attention.cache import KVCache
from volvelle.parts.attention.linear import LinearState
from volvelle.parts.attention.state_cache import StateCache


def written(cache, tokens, padding=None, path=None):
    """Run tokens (b, n), whose number is their key and value, and commit."""
    step = cache.begin(tokens.shape[1], padding=padding)
    states = tokens.double()[:, None, :, None].expand(-1, cache.kv_heads, -1, cache.head_width)
    for layer in range(cache.layers):
        cache.append(layer, states + layer, -states - layer)
    cache.commit(path)
    return step


def rows_of(cache):
    """The tokens that each row sees, in order, as a next step would: of every layer the same."""
    step = cache.begin(1)
    b, texts = cache.batch, []
    for layer in range(cache.layers):
        new = torch.zeros(b, cache.kv_heads, 1, cache.head_width, dtype=torch.float64)
        k, v = cache.append(layer, new, new)
        seen = torch.ones(b, k.shape[2], dtype=torch.bool) if step.mask is None else step.mask[:, 0, 0].expand(b, -1)
        texts.append([(k[row, 0, seen[row], 0] - layer).tolist()[:-1] for row in range(b)])
        assert torch.equal(v[..., :-1, :], -k[..., :-1, :])
    assert all(text == texts[0] for text in texts)
    positions = step.positions.expand(b, 1)[:, 0].tolist()
    assert positions == [len(text) for text in texts[0]]
    return texts[0]


def ragged():
    cache = KVCache.allocate(2, 3, 2, 24, 4, torch.float64)
    real = torch.tensor([[True] * 4, [False, False, True, True], [False, True, True, True]])
    written(cache, torch.arange(12).view(3, 4), padding=real)
    written(cache, torch.arange(20, 32).view(3, 4), path=torch.tensor([[0, -1, -1], [0, 2, 3], [1, -1, -1]]))
    written(cache, torch.arange(40, 43).view(3, 1))
    return cache


TEXTS = [[0, 1, 2, 3, 20, 40], [6, 7, 24, 26, 27, 41], [9, 10, 11, 29, 42]]


def test_moving_together_changes_no_text():
    cache = ragged()
    assert rows_of(cache) == TEXTS
    assert cache.length == 8
    cache.begin(2)  # an open step is forgotten
    cache.compact()
    assert (cache.length, cache.lengths.tolist()) == (6, [6, 6, 5])
    assert rows_of(cache) == TEXTS
    written(cache, torch.tensor([[60, 61], [62, 63], [64, 65]]), path=torch.tensor([[0, 1], [1, -1], [-1, -1]]))
    expected = [[*TEXTS[0], 60, 61], [*TEXTS[1], 63], TEXTS[2]]
    assert rows_of(cache) == expected
    cache.compact()
    assert cache.length == 8
    assert rows_of(cache) == expected
    assert cache.key_positions(torch.zeros(3, 1, dtype=torch.long))[2].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 0]


def test_without_holes_left_nothing_is_masked():
    cache = KVCache.allocate(1, 2, 1, 12, 2, torch.float64)
    written(cache, torch.arange(8).view(2, 4), padding=torch.tensor([[True, True, False, True], [True] * 3 + [False]]))
    cache.compact()
    step = cache.begin(1)
    assert step.mask is None
    assert step.positions.tolist() == [[3]]
    cache.compact()
    assert rows_of(cache) == [[0, 1, 3], [4, 5, 6]]


def test_forgotten_rows_begin_anew():
    cache = ragged()
    cache.forget(torch.tensor([1]))
    assert rows_of(cache) == [TEXTS[0], [], TEXTS[2]]
    written(cache, torch.tensor([[60], [61], [62]]))
    assert rows_of(cache) == [[*TEXTS[0], 60], [61], [*TEXTS[2], 62]]
    cache.forget(torch.tensor([0, 2]))
    cache.compact()
    assert cache.length == 1
    assert rows_of(cache) == [[], [61], []]


@pytest.mark.parametrize("move", [lambda c: c.compact(), lambda c: c.forget(torch.tensor([0]))])
def test_snapshots_of_before_are_lost(move):
    cache = ragged()
    snapshot = cache.snapshot()
    move(cache)
    with pytest.raises(ValueError, match="lost when rows were moved"):
        cache.restore(snapshot)
    later = cache.snapshot()
    written(cache, torch.arange(3).view(3, 1))
    cache.restore(later)


def test_a_step_can_be_cut():
    cache = ragged()
    cache.begin(4, padding=torch.tensor([[True, True, False, False]] * 3))
    states = torch.arange(60, 72).double().view(3, 1, 4, 1).expand(-1, 2, -1, 4)
    for layer in range(2):
        cache.append(layer, states + layer, -states - layer)
    cache.trim(2)
    cache.commit()
    assert cache.length == 10
    assert rows_of(cache) == [[*TEXTS[0], 60, 61], [*TEXTS[1], 64, 65], [*TEXTS[2], 68, 69]]
    cache.begin(2)
    for n in (0, 3):
        with pytest.raises(ValueError, match="open step has 2 tokens"):
            cache.trim(n)


def test_states_forget_rows_too():
    cache = StateCache.allocate(2, 3, 2, 4, dtype=torch.float64)
    k = torch.rand(3, 2, 5, 4, dtype=torch.float64)
    cache.begin(5)
    for layer in range(2):
        cache.append(layer, cache.state(layer).after(k, k), k, k)
    cache.commit(torch.tensor([[0, 1, 2], [0, -1, -1], [0, 1, -1]]))
    before = [cache.state(layer) for layer in range(2)]
    cache.compact()
    assert cache.lengths.tolist() == [3, 1, 2]
    cache.forget(torch.tensor([0, 2]))
    assert cache.lengths.tolist() == [0, 1, 0]
    empty = LinearState(*(torch.zeros_like(x) for x in before[0]))
    for layer in range(2):
        for now, then, none in zip(cache.state(layer), before[layer], empty, strict=True):
            assert torch.equal(now[1], then[1])
            assert torch.equal(now[[0, 2]], none[[0, 2]])
    assert cache.begin(2).positions.tolist() == [[0, 1], [1, 2], [0, 1]]
