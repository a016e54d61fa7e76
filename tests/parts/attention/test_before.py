"""Keys that come before: the books of a cache that holds them, without one; gradients; every back end."""

from __future__ import annotations

import math

import pytest
import torch

from volvelle.parts.attention.attention import BACKENDS, attention
from volvelle.parts.attention.before import Before, Recorder
from volvelle.parts.attention.cache import KVCache

LAYERS, B, H, LONG, N, D = 2, 3, 2, 4, 5, 3

RAGGED = torch.tensor([[True] * 4, [False, True, True, True], [False] * 4])
PADDING = torch.tensor([[True] * 5, [False, False, True, True, True], [True, True, True, False, False]])
TREE = torch.tensor(
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]], dtype=torch.bool
)


def states(rows=1, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(LAYERS, 2, rows, H, LONG, D, dtype=dtype)


@pytest.mark.parametrize("present", [None, RAGGED], ids=["all", "ragged"])
@pytest.mark.parametrize(
    "kind",
    [{}, {"padding": PADDING}, {"tree": TREE}, {"tree": TREE.expand(B, -1, -1)}],
    ids=["", "pad", "tree", "trees"],
)
def test_a_step_is_that_of_a_cache_which_holds_the_keys(present, kind):
    before = Before(states(1 if present is None else B), present)
    cache = KVCache.allocate(LAYERS, B, H, LONG + N, D, torch.float64)
    before.fill(cache)
    ours, theirs = before.begin(N, **kind), cache.begin(N, **kind)
    assert torch.equal(ours.positions.expand_as(theirs.positions), theirs.positions)
    assert torch.equal(ours.mask.expand_as(theirs.mask), theirs.mask)
    assert ours.causal == theirs.causal
    k, v = torch.randn(2, B, H, N, D, dtype=torch.float64)
    for layer in range(LAYERS):
        for one, other in zip(before.append(layer, k, v), cache.append(layer, k, v), strict=True):
            seen = torch.ones(B, LONG + N, dtype=torch.bool)
            if present is not None:
                seen[:, :LONG] = present
            assert torch.equal(one[seen[:, None].expand(B, H, -1)], other[seen[:, None].expand(B, H, -1)])
    positions = ours.positions.expand(B, N)
    assert torch.equal(before.key_positions(positions).expand(B, -1), cache.key_positions(positions).expand(B, -1))


def test_positions_begin_after_the_keys_of_the_row():
    before = Before(states(B), RAGGED)
    assert before.begin(2).positions.tolist() == [[4, 5], [3, 4], [0, 1]]
    assert before.lengths.tolist() == [[4], [3], [0]]
    assert Before(states()).begin(2).positions.tolist() == [[4, 5]]


@pytest.mark.parametrize("backend", sorted(BACKENDS.keys() - {"triton"}))  # that one runs on CUDA, and not in fp64
@pytest.mark.parametrize("present", [None, RAGGED], ids=["all", "ragged"])
def test_every_back_end_against_a_loop(backend, present):
    before = Before(states(1 if present is None else B), present)
    q, k, v = torch.randn(3, B, H, N, D, dtype=torch.float64)
    step = before.begin(N, padding=PADDING)
    keys, values = before.append(1, k, v)
    ours = attention(q, keys, values, mask=step.mask, causal=step.causal, backend=backend)
    for b in range(B):
        for i in range(N):
            if not PADDING[b, i]:
                continue
            for h in range(H):
                reach = [j for j in range(LONG) if present is None or present[b, j]]
                pairs = [(before.states[1, 0, b * (present is not None), h, j],
                          before.states[1, 1, b * (present is not None), h, j]) for j in reach]  # fmt: skip
                pairs += [(k[b, h, j], v[b, h, j]) for j in range(i + 1) if PADDING[b, j]]
                weights = [math.exp(float(q[b, h, i] @ key) / math.sqrt(D)) for key, _ in pairs]
                expected = sum(w * value for w, (_, value) in zip(weights, pairs, strict=True)) / sum(weights)
                torch.testing.assert_close(ours[b, h, i], expected)


def test_gradients_reach_the_keys_and_not_the_cache():
    given = states().requires_grad_()
    k = torch.randn(B, H, N, D, dtype=torch.float64)

    def result(x):
        before = Before(x)
        step = before.begin(N)
        return attention(k, *before.append(0, k, k), mask=step.mask, causal=step.causal, backend="reference")

    assert torch.autograd.gradcheck(result, (given,))
    cache = KVCache.allocate(LAYERS, B, H, LONG + N, D, torch.float64)
    Before(given).fill(cache)
    cache.begin(N)
    assert not any(x.requires_grad for x in cache.append(0, k, k))


def test_half_precision_layers_get_their_own_dtype():
    k = torch.randn(B, H, N, D, dtype=torch.bfloat16)
    keys, values = Before(states(dtype=torch.float32)).append(0, k, k)
    assert keys.dtype == values.dtype == torch.bfloat16


def test_a_reset_cache_is_filled_again():
    cache = KVCache.allocate(LAYERS, B, H, LONG + N, D, torch.float64)
    Before(states()).fill(cache)
    assert cache.length == LONG
    cache.reset()
    Before(states()).fill(cache)
    assert cache.begin(1).positions.tolist() == [[LONG]]


def test_a_recording_can_come_before():
    recorder = Recorder()
    step = recorder.begin(LONG)
    assert step.positions.tolist() == [[0, 1, 2, 3]]
    assert (step.mask, step.causal) == (None, True)
    given = states()
    for layer in (1, 0):
        recorder.append(layer, *given[layer])
    assert torch.equal(recorder.states, given)
    with pytest.raises(ValueError, match="no padding and is no tree"):
        recorder.begin(2, tree=TREE)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"Before: states must be \(layers, 2, b, h_kv, l, d\), got \(2, 3\)"):
        Before(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"Before: present must be \(b, l\) = \(1, 4\), got \(3, 4\)"):
        Before(states(), RAGGED)
    with pytest.raises(ValueError, match="begin a step first"):
        Before(states()).key_positions(torch.arange(2))
    cache = KVCache.allocate(1, B, H, 9, D, torch.float64)
    with pytest.raises(ValueError, match="keys for 2 layers, but the cache has 1"):
        Before(states()).fill(cache)
    cache = KVCache.allocate(LAYERS, B, H, 9, D, torch.float64)
    Before(states()).fill(cache)
    with pytest.raises(ValueError, match="already holds 4 tokens"):
        Before(states()).fill(cache)
