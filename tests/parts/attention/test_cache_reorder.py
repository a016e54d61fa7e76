"""Rows of a cache that go on from other rows: what a beam search asks of it."""

from __future__ import annotations

import pytest
import torch

from volvelle.parts.attention.cache import KVCache


def filled(batch=3, steps=(2, 1), padding=None):
    """A cache in which every key and value says which row and slot it was written for."""
    cache = KVCache.allocate(2, batch, 2, 8, 4)
    for number, n in enumerate(steps):
        cache.begin(n, padding=padding if number == 0 else None)
        for layer in range(2):
            rows, slots = torch.arange(batch).view(-1, 1, 1, 1), torch.arange(cache.length, cache.length + n)[:, None]
            k = (100.0 * rows + slots + 1000 * layer).expand(batch, 2, n, 4)
            cache.append(layer, k, -k)
        cache.commit()
    return cache


def held(cache):
    """All committed keys and values, by layer."""
    cache.begin(1)
    b = cache.batch
    return [[x[:, :, :-1].clone() for x in cache.append(i, torch.zeros(b, 2, 1, 4), torch.zeros(b, 2, 1, 4))]
            for i in range(2)]  # fmt: skip


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 1], [0, 0, 2], [0, 1, 2], [0, 0, 1, 1, 2, 2, 2], [2]])
def test_each_row_goes_on_from_the_row_it_names(rows):
    expected = [[x[rows] for x in layer] for layer in held(filled())]
    cache = filled()
    cache.reorder(torch.tensor(rows))
    assert cache.batch == len(rows)
    assert cache.length == 3
    for layer, wanted in zip(held(cache), expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(layer, wanted, strict=True))


def test_holes_go_with_their_rows():
    padding = torch.tensor([[True, True], [False, True], [False, False]])
    cache = filled(padding=padding)
    cache.reorder(torch.tensor([2, 0, 0, 1]))
    assert cache.lengths.tolist() == [1, 3, 3, 2]
    step = cache.begin(1)
    assert step.positions.tolist() == [[1], [3], [3], [2]]
    assert step.mask[:, 0, 0].tolist() == [
        [False, False, True, True], [True] * 4, [True] * 4, [False, True, True, True],
    ]  # fmt: skip


def test_an_open_step_is_forgotten():
    cache = filled()
    cache.begin(2, padding=torch.tensor([[True, False]] * 3))
    cache.reorder(torch.tensor([0, 0, 1]))
    step = cache.begin(1)
    assert (step.positions == 3).all()
    assert step.mask is None or step.mask.all()


def test_snapshots_end_with_the_order_of_rows():
    cache = filled()
    before = cache.snapshot()
    cache.reorder(torch.tensor([0, 1, 2]))
    cache.restore(before)
    cache.reorder(torch.tensor([1, 0, 2]))
    with pytest.raises(ValueError, match="the snapshot at 3 was lost when rows were moved"):
        cache.restore(before)
    after = cache.snapshot()
    cache.begin(1)
    cache.commit()
    cache.restore(after)
    assert cache.length == 3


def test_a_wrong_row_is_an_error():
    with pytest.raises((IndexError, RuntimeError)):
        filled().reorder(torch.tensor([0, 3, 1]))
