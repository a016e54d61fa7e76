"""StateCache: whatever was kept, rejected, padded or rolled back, linear attention sees what a fresh text gives."""

from __future__ import annotations

import random

import pytest
import torch
from tests.parts.attention.test_cache import MISTAKES, ancestors, as_path, random_tree, refuses, way_to

from volvelle.parts.attention.cache import Cache, KVCache
from volvelle.parts.attention.linear import LinearState, linear_attention
from volvelle.parts.attention.state_cache import StateCache
from volvelle.parts.position.rope import RotaryEmbedding

LAYERS, H, H_KV, D, WORDS = 2, 4, 2, 8, 50
ROPE = RotaryEmbedding(D, base=100.0)


class Words:
    """Queries, keys and values of each word in each layer, as a model's projections would give them."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda h: torch.randn(LAYERS, WORDS, h, D, generator=generator, dtype=torch.float64)  # noqa: E731
        self.tables = draw(H), draw(H_KV), draw(H_KV)

    def project(self, layer, ids):
        return [table[layer][ids].transpose(1, 2) for table in self.tables]  # (b, h, n, d)

    def fresh(self, layer, ids):
        """The outputs (n, h, d) of one row of words, computed without a cache."""
        rotation = ROPE.rotation(torch.arange(len(ids)), torch.float64)
        projected = self.project(layer, torch.tensor([ids]))
        return linear_attention(*projected, causal=True, rotation=rotation)[0].transpose(0, 1)


def run(words, cache, ids, **kind):
    """One step through all layers: outputs (layers, b, n, h, d)."""
    step, outputs = cache.begin(ids.shape[1], **kind), []
    rotation = ROPE.rotation(step.positions, torch.float64)
    mask = step.mask if step.mask is None else step.mask[:, 0, 0] if step.mask.shape[2] == 1 else step.mask[:, 0]
    for layer in range(LAYERS):
        q, k, v = words.project(layer, ids)
        out, after = linear_attention(q, k, v, rotation=rotation, mask=mask, state=cache.state(layer))
        cache.append(layer, after, k, v, rotation)
        outputs.append(out.transpose(1, 2))
    return torch.stack(outputs)


def new_cache(batch, **options):
    empty = StateCache.allocate(LAYERS, batch, H_KV, D, dtype=torch.float64)
    return StateCache(tuple(empty.state(layer) for layer in range(LAYERS)), **options)


@pytest.mark.parametrize("seed", range(12))
def test_random_traces_equal_a_fresh_text(seed):
    """Left padding, single tokens, chunks, trees; full, partial and empty acceptance by row; snapshots and returns."""
    rng, words = random.Random(seed), Words(seed)
    generator = torch.Generator().manual_seed(seed)
    batch = 1 + seed % 3
    cache = new_cache(batch)
    kept, snapshots = [[] for _ in range(batch)], []
    for turn in range(10):
        n = rng.choice([1, 1, 2, 3, 5, 7])
        ids = torch.randint(WORDS, (batch, n), generator=generator)
        parents, kind, real = list(range(-1, n - 1)), {}, [[True] * n for _ in range(batch)]
        if rng.random() < 0.4:
            parents = random_tree(rng, n)
            tree = ancestors(parents)
            kind["tree"] = tree if rng.random() < 0.5 else tree.expand(batch, n, n)
        elif turn == 0 or rng.random() < 0.3:
            real = [[i >= padded for i in range(n)] for padded in (rng.randrange(n) for _ in range(batch))]
            kind["padding"] = torch.tensor(real)
        outputs = run(words, cache, ids, **kind)
        assert outputs.isfinite().all()
        check_step(words, outputs, kept, ids, parents, real)
        action = rng.random()
        if action < 0.1:
            continue  # never committed: the next step takes its place
        if action < 0.4 and "tree" not in kind:
            cache.commit()
            ways = [[i for i in range(n) if real[row][i]] for row in range(batch)]
        else:
            ways = [[i for i in way_to(parents, rng.randrange(-1, n)) if real[row][i]] for row in range(batch)]
            cache.commit(as_path(ways))
        kept = [so_far + [int(ids[row, i]) for i in ways[row]] for row, so_far in enumerate(kept)]
        assert cache.lengths.tolist() == [len(row) for row in kept]
        snapshots.append((cache.snapshot(), kept))
        if rng.random() < 0.3:
            snapshot, kept = rng.choice(snapshots)  # forth as well as back
            cache.restore(snapshot)
            assert cache.lengths.tolist() == [len(row) for row in kept]


def check_step(words, outputs, kept, ids, parents, real):
    """Each new real token's output equals its output at the end of the kept words and its own ancestors."""
    for row in range(ids.shape[0]):
        for node in (node for node in range(ids.shape[1]) if real[row][node]):
            text = kept[row] + [int(ids[row, i]) for i in way_to(parents, node) if real[row][i]]
            for layer in range(LAYERS):
                expected = words.fresh(layer, text)[-1]
                torch.testing.assert_close(outputs[layer, row, node], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rows", [1, 3])
def test_both_caches_answer_a_loop_alike(rows):
    """Positions and lengths, which are all that a decoding loop reads, do not tell which cache it has."""
    rng, caches = random.Random(rows), []
    for make in (lambda: new_cache(rows), lambda: KVCache.allocate(LAYERS, rows, H_KV, 64, D, dtype=torch.float64)):
        cache, seen, rng = make(), [], random.Random(rows)
        for turn in range(8):
            n = rng.choice([1, 2, 4])
            padding = torch.arange(n) >= torch.tensor([[rng.randrange(n)] for _ in range(rows)])
            tree = ancestors(random_tree(rng, n))
            kind = [{}, {"padding": padding}, {"tree": tree}][rng.randrange(3)]
            step = cache.begin(n, **kind)
            real = padding if "padding" in kind else torch.ones(rows, n, dtype=torch.bool)
            seen.append(step.positions.expand(rows, n)[real].tolist())
            keys = torch.zeros(rows, H_KV, n, D, dtype=torch.float64)
            for layer in range(LAYERS):
                if isinstance(cache, StateCache):
                    cache.append(layer, cache.state(layer).after(keys, keys), keys, keys)
                else:
                    cache.append(layer, keys, keys)
            path = [None, torch.tensor([[0, n - 1][: rng.randrange(1, 3)] for _ in range(1)] * rows)][turn % 2]
            cache.commit(path if path is None or path.shape[1] <= n else path[:, :1])
            seen.append((cache.length, cache.lengths.tolist()))
            if turn == 5:
                cache.reorder(torch.arange(rows).flip(0))
        caches.append(seen)
    assert caches[0] == caches[1]


def test_the_memory_does_not_grow():
    words, cache = Words(), new_cache(2)
    expected = LAYERS * 2 * H_KV * D * (D + 1)
    assert cache.numbers == expected
    for n in (1, 40, 3):
        run(words, cache, torch.randint(WORDS, (2, n)))
        cache.commit()
        assert cache.numbers == expected
        held = [x for x in vars(cache).values() if isinstance(x, torch.Tensor)]
        assert sum(x.numel() for x in held) == 2  # the rows' lengths
        assert not cache._written
    assert cache.length == 44


def test_snapshots_come_back_bit_for_bit():
    words, cache = Words(), new_cache(2)
    run(words, cache, torch.randint(WORDS, (2, 5)), padding=torch.tensor([[True] * 5, [False] * 2 + [True] * 3]))
    cache.commit()
    here, before = cache.snapshot(), [[x.clone() for x in cache.state(layer)] for layer in range(LAYERS)]
    run(words, cache, torch.randint(WORDS, (2, 4)))
    cache.commit(torch.tensor([[0, 1], [0, -1]]))
    there, after = cache.snapshot(), [[x.clone() for x in cache.state(layer)] for layer in range(LAYERS)]
    for snapshot, states, lengths in ((here, before, [5, 3]), (there, after, [7, 4]), (here, before, [5, 3])):
        cache.restore(snapshot)
        assert cache.lengths.tolist() == lengths
        for layer in range(LAYERS):
            assert all(map(torch.equal, cache.state(layer), states[layer]))


def test_rows_can_be_reordered_and_the_cache_used_again():
    words, cache = Words(), new_cache(2)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    run(words, cache, ids, padding=torch.tensor([[True] * 3, [False, True, True]]))
    cache.commit()
    cache.reorder(torch.tensor([1, 0, 1]))
    assert (cache.batch, cache.lengths.tolist()) == (3, [2, 3, 2])
    out = run(words, cache, torch.tensor([[7], [8], [9]]))
    for row, text in enumerate(([5, 6, 7], [1, 2, 3, 8], [5, 6, 9])):
        torch.testing.assert_close(out[0, row, 0], words.fresh(0, text)[-1], rtol=0, atol=1e-12)
    cache.reset()
    assert (cache.length, cache.lengths.tolist()) == (0, [0, 0, 0])
    out = run(words, cache, torch.tensor([[7, 1]] * 3))
    torch.testing.assert_close(out[0, 2], words.fresh(0, [7, 1]), rtol=0, atol=1e-12)


def test_long_steps_are_kept_whole_or_not_at_all():
    words, cache = Words(), new_cache(1, draft=4)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    for path in (None, torch.arange(5)[None]):
        cache.reset()
        run(words, cache, ids)
        assert all(written is not None and written.k is None for written in cache._written)
        cache.commit(path)
        out = run(words, cache, torch.tensor([[6]]))
        torch.testing.assert_close(out[1, 0, 0], words.fresh(1, [1, 2, 3, 4, 5, 6])[-1], rtol=0, atol=1e-12)
    run(words, cache, ids)
    with pytest.raises(ValueError, match="of a step of 5 tokens, more than 4, no part can be kept"):
        cache.commit(torch.tensor([[0, 1]]))
    assert cache.length == 5
    run(words, cache, ids[:, :4])
    cache.commit(torch.tensor([[0, 3]]))
    assert cache.length == 7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *MISTAKES,
        (lambda c, k: c.append(0, c.state(0), k[:, :, :2], k), "the open step has 3 tokens, got k of shape"),
        (lambda c, k: c.append(0, c.state(0), k.clone().requires_grad_(), k), "require gradients cannot be kept"),
        (lambda c, k: c.commit(), "layer 0 has written nothing"),
        (lambda c, k: c.begin(0), "at least one token"),
        (
            lambda c, k: c.begin(
                2, padding=torch.ones(2, 2, dtype=torch.bool), tree=torch.ones(2, 2, dtype=torch.bool)
            ),
            "not both",
        ),
    ],
)
def test_errors(call, message):
    refuses(new_cache(2), call, message)


def test_it_is_a_cache_and_16_bits_are_summed_in_32():
    cache: Cache = StateCache.allocate(1, 1, 2, 4, dtype=torch.bfloat16)
    assert isinstance(cache, StateCache)
    assert cache.state(0).s.dtype == torch.float32


def rejected_stays(monkeypatch):
    monkeypatch.setattr(StateCache, "_kept", lambda self, layer, path, taken: self._written[layer].after)


def one_position_for_all_rows(monkeypatch):
    right = StateCache._positions

    def wrong(self, n, padding, tree):
        self._ragged = False
        return right(self, n, padding, tree)

    monkeypatch.setattr(StateCache, "_positions", wrong)


def padding_enters_the_state(monkeypatch):
    right = StateCache.begin

    def wrong(self, n, **kind):
        step = right(self, n, **kind)
        return step if "tree" in kind else step._replace(mask=None)

    monkeypatch.setattr(StateCache, "begin", wrong)


def a_path_begins_at_zero(monkeypatch):
    right = LinearState.after

    def wrong(self, *tokens, **options):
        return right(LinearState(self.s * 0, self.z), *tokens, **options)

    monkeypatch.setattr(LinearState, "after", wrong)


def all_traces():
    for seed in range(12):
        test_random_traces_equal_a_fresh_text(seed)


@pytest.mark.parametrize(
    "mutant", [rejected_stays, one_position_for_all_rows, padding_enters_the_state, a_path_begins_at_zero]
)
def test_mutants_are_caught(mutant, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        all_traces()


def test_a_text_takes_a_row_and_the_others_go_on():
    """Read alone, then adopted in the place of another: every row goes on as a text of its own would."""
    words, cache = Words(), new_cache(3)
    texts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    run(words, cache, torch.tensor(texts))
    cache.commit()
    alone, texts[1] = new_cache(1), [11, 12, 13, 14, 15]
    run(words, alone, torch.tensor([texts[1]]))
    alone.commit()
    cache.adopt(1, alone)
    assert cache.lengths.tolist() == [3, 5, 3]
    assert cache.length == 5
    out = run(words, cache, torch.tensor([[20], [21], [22]]))
    for row, text in enumerate(texts):
        for layer in range(LAYERS):
            torch.testing.assert_close(out[layer, row, 0], words.fresh(layer, [*text, 20 + row])[-1])


@pytest.mark.parametrize(
    "other", [new_cache(2), StateCache.allocate(LAYERS + 1, 1, H_KV, D), StateCache.allocate(LAYERS, 1, H_KV, D + 2)]
)
def test_what_cannot_be_adopted_is_said(other):
    with pytest.raises(ValueError, match="one text of 2 layers with states"):
        new_cache(3).adopt(0, other)
