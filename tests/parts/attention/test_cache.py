"""KVCache: whatever was kept, rejected, padded or rolled back, attention sees what a fresh prefill would see."""

import random

import pytest
import torch

from volvelle.parts.attention.attention import attention
from volvelle.parts.attention.cache import KVCache
from volvelle.parts.position.rope import RotaryEmbedding

LAYERS, H, H_KV, D, CONTEXT, WORDS = 2, 4, 2, 8, 48, 50
ROPE = RotaryEmbedding(D, base=100.0)


class Words:
    """Queries, keys and values of each word in each layer, as a model's projections would give them."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda h: torch.randn(LAYERS, WORDS, h, D, generator=generator, dtype=torch.float64)  # noqa: E731
        self.q, self.k, self.v = draw(H), draw(H_KV), draw(H_KV)

    def project(self, layer, ids, positions):
        q, k, v = (table[layer][ids].transpose(1, 2) for table in (self.q, self.k, self.v))  # (b, h, n, d)
        return *ROPE(q, k, positions), v

    def fresh(self, layer, ids):
        """The outputs (n, h, d) of one row of words, computed without a cache."""
        q, k, v = self.project(layer, torch.tensor([ids]), torch.arange(len(ids)))
        return attention(q, k, v, causal=True, backend="reference")[0].transpose(0, 1)


def run(words, cache, ids, **kind):
    """One step through all layers: outputs (layers, b, n, h, d)."""
    step = cache.begin(ids.shape[1], **kind)
    outputs = []
    for layer in range(LAYERS):
        q, k, v = words.project(layer, ids, step.positions)
        k_all, v_all = cache.append(layer, k, v)
        outputs.append(attention(q, k_all, v_all, mask=step.mask, causal=step.causal).transpose(1, 2))
    return torch.stack(outputs)


def new_cache(batch, context=CONTEXT, dtype=torch.float64):
    return KVCache.allocate(LAYERS, batch, H_KV, context, D, dtype=dtype)


def random_tree(rng, n):
    """Parents of n nodes (-1 = root), each node after its parent."""
    return [rng.randrange(-1, i) for i in range(n)]


def ancestors(parents):
    """The tree mask: each node may attend to its ancestors and itself."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            mask[i] |= mask[parent]
    return mask


def way_to(parents, node):
    way = []
    while node >= 0:
        way.append(node)
        node = parents[node]
    return way[::-1]


def check_step(words, outputs, kept, ids, parents, real):
    """Each new real token's output equals its output at the end of the kept words and its own ancestors."""
    for row in range(ids.shape[0]):
        for node in range(ids.shape[1]):
            if not real[row][node]:
                continue
            way = [i for i in way_to(parents, node) if real[row][i]]
            text = kept[row] + [int(ids[row, i]) for i in way]
            for layer in range(LAYERS):
                expected = words.fresh(layer, text)[-1]
                torch.testing.assert_close(outputs[layer, row, node], expected, rtol=0, atol=1e-12)


def as_path(ways):
    width = max(map(len, ways))
    return torch.tensor([way + [-1] * (width - len(way)) for way in ways], dtype=torch.int64).view(len(ways), width)


@pytest.mark.parametrize("seed", range(12))
def test_random_traces_equal_a_fresh_prefill(seed):
    """Left padding, single tokens, chunks, trees; full, partial and empty acceptance by row; snapshots and returns."""
    rng, words = random.Random(seed), Words(seed)
    generator = torch.Generator().manual_seed(seed)
    batch = 1 + seed % 3
    cache = new_cache(batch)
    kept = [[] for _ in range(batch)]
    snapshots = []
    for turn in range(9):
        n = rng.choice([1, 1, 2, 3, 5, 7])
        if cache.length + n > CONTEXT:
            break
        ids = torch.randint(WORDS, (batch, n), generator=generator)
        parents, tree = list(range(-1, n - 1)), None
        real = [[True] * n for _ in range(batch)]
        kind = {}
        if rng.random() < 0.4:
            parents = random_tree(rng, n)
            tree = ancestors(parents)
            kind["tree"] = tree if rng.random() < 0.5 else tree.expand(batch, n, n)
        elif turn == 0 or rng.random() < 0.3:
            for row in range(batch):
                padded = rng.randrange(n)
                real[row] = [False] * padded + [True] * (n - padded)
            kind["padding"] = torch.tensor(real)
        outputs = run(words, cache, ids, **kind)
        assert outputs.isfinite().all()
        check_step(words, outputs, kept, ids, parents, real)
        action = rng.random()
        if action < 0.1:
            continue  # never committed: the next step overwrites it
        if action < 0.4 and tree is None:
            cache.commit()
            ways = [[i for i in range(n) if real[row][i]] for row in range(batch)]
        else:
            ways = []
            for row in range(batch):
                way = [i for i in way_to(parents, rng.randrange(-1, n)) if real[row][i]]
                ways.append(way)
            cache.commit(as_path(ways))
        kept = [words_so_far + [int(ids[row, i]) for i in ways[row]] for row, words_so_far in enumerate(kept)]
        assert cache.lengths.tolist() == [len(row) for row in kept]
        if rng.random() < 0.4:
            snapshots.append((cache.snapshot(), kept))
        if snapshots and rng.random() < 0.3:
            at = rng.randrange(len(snapshots))
            snapshots = snapshots[: at + 1]
            snapshot, kept = snapshots[at]
            cache.restore(snapshot)
            assert cache.lengths.tolist() == [len(row) for row in kept]


def test_one_row_wastes_no_slot():
    """A tree's accepted path moves to the front, so a single row never has holes and decodes without a mask."""
    words, cache = Words(), new_cache(1)
    run(words, cache, torch.tensor([[1, 2, 3]]))
    cache.commit()
    run(words, cache, torch.tensor([[4, 5, 6, 7, 8]]), tree=ancestors([-1, -1, 0, 1, 3]))
    cache.commit(torch.tensor([[1, 3, 4]]))
    assert cache.length == 6
    step = cache.begin(1)
    assert step.mask is None
    assert step.positions.tolist() == [[6]]
    outputs = run(words, cache, torch.tensor([[9]]))
    for layer in range(LAYERS):
        expected = words.fresh(layer, [1, 2, 3, 5, 7, 8, 9])[-1]
        torch.testing.assert_close(outputs[layer, 0, 0], expected, rtol=0, atol=1e-12)


def test_a_kept_prefix_is_not_touched():
    """Accepting the first tokens of a chain moves no number: the stored bits stay those that were written."""
    cache = new_cache(2)
    k = torch.randn(2, H_KV, 4, D, dtype=torch.float64)
    cache.begin(4)
    for layer in range(LAYERS):
        k_all, _ = cache.append(layer, k, k)
    pointer = k_all.data_ptr()
    cache.commit(torch.tensor([[0, 1, 2], [0, 1, -1]]))
    cache.begin(1)
    k_all, _ = cache.append(0, k[:, :, :1], k[:, :, :1])
    assert k_all[:, :, :3].equal(k[:, :, :3])
    assert cache.append(LAYERS - 1, k[:, :, :1], k[:, :, :1])[0].data_ptr() == pointer  # and the past is never copied


def test_masks_and_positions_of_the_plain_cases():
    cache = new_cache(2)
    step = cache.begin(3)
    assert (step.positions.tolist(), step.mask, step.causal) == ([[0, 1, 2]], None, True)
    cache.commit()
    step = cache.begin(1)
    assert (step.positions.tolist(), step.mask, step.causal) == ([[3]], None, False)
    step = cache.begin(2)
    assert step.positions.tolist() == [[3, 4]]
    assert step.mask is not None
    assert step.mask[0, 0].tolist() == [[True] * 4 + [False], [True] * 5]


def test_left_padding():
    cache = new_cache(2)
    step = cache.begin(3, padding=torch.tensor([[False, False, True], [True, True, True]]))
    assert step.positions.tolist() == [[0, 0, 0], [0, 1, 2]]
    assert step.mask is not None
    assert step.mask[0, 0].tolist() == [[False] * 3, [False] * 3, [False, False, True]]
    assert step.mask[1, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    cache.commit()
    assert cache.lengths.tolist() == [1, 3]
    step = cache.begin(1)
    assert step.positions.tolist() == [[1], [3]]
    assert step.mask is not None
    assert step.mask.tolist() == [[[[False, False, True, True]]], [[[True] * 4]]]


def test_padding_that_hides_nothing_costs_nothing():
    cache = new_cache(2)
    step = cache.begin(3, padding=torch.ones(2, 3, dtype=torch.bool))
    assert step.mask is None
    assert step.causal


def test_a_row_that_has_finished_stays_as_it_is():
    words, cache = Words(), new_cache(2)
    run(words, cache, torch.tensor([[1, 2], [3, 4]]))
    cache.commit()
    for _ in range(3):
        run(words, cache, torch.tensor([[5], [6]]), padding=torch.tensor([[True], [False]]))
        cache.commit()
    assert cache.lengths.tolist() == [5, 2]
    outputs = run(words, cache, torch.tensor([[7], [8]]))
    for row, text in enumerate(([1, 2, 5, 5, 5, 7], [3, 4, 8])):
        torch.testing.assert_close(outputs[0, row, 0], words.fresh(0, text)[-1], rtol=0, atol=1e-12)


def test_padding_inside_an_accepted_path_stays_a_hole():
    cache = new_cache(2)
    cache.begin(3, padding=torch.tensor([[False, True, True], [True, True, True]]))
    cache.commit(torch.tensor([[0, 1, -1], [0, 1, 2]]))
    assert cache.lengths.tolist() == [1, 3]
    assert cache.begin(1).positions.tolist() == [[1], [3]]


def test_reset_and_reuse():
    words, cache = Words(), new_cache(1)
    run(words, cache, torch.tensor([[1, 2, 3]]), padding=torch.tensor([[False, True, True]]))
    cache.commit()
    cache.reset()
    assert (cache.length, cache.lengths.tolist()) == (0, [0])
    outputs = run(words, cache, torch.tensor([[4, 5]]))
    torch.testing.assert_close(outputs[0, 0], words.fresh(0, [4, 5]), rtol=0, atol=1e-12)


def test_a_snapshot_that_was_overwritten_is_refused():
    cache = new_cache(1)
    cache.begin(4)
    cache.commit()
    early = cache.snapshot()
    cache.begin(4)
    cache.commit()
    late = cache.snapshot()
    cache.restore(early)
    cache.restore(early)  # as often as wanted
    with pytest.raises(ValueError, match="the snapshot at 8 was lost when the cache went back to 4"):
        cache.restore(late)
    cache.begin(4)
    cache.commit()
    fresh = cache.snapshot()
    cache.begin(1)
    cache.commit()
    cache.restore(fresh)
    assert cache.length == 8
    cache.reset()
    with pytest.raises(ValueError, match="was lost when the cache went back to 0"):
        cache.restore(early)


def test_overflow_is_named_and_leaves_the_cache_usable():
    cache = new_cache(1, context=4)
    cache.begin(4)
    cache.commit()
    with pytest.raises(ValueError, match="KVCache: 1 tokens after 4 do not fit into a context of 4"):
        cache.begin(1)
    assert cache.length == 4
    full = new_cache(1, context=4)
    full.begin(4)
    full.commit(torch.tensor([[0, 1, 2, 3]]))
    assert full.length == 4


def refuses(cache, call, message):
    """In a step of 2 rows and 3 tokens the call is an error, and nothing is written."""
    cache.begin(3)
    with pytest.raises(ValueError, match=f"{type(cache).__name__}: .*{message}"):
        call(cache, torch.zeros(2, H_KV, 3, D, dtype=torch.float64))
    assert cache.length == 0


# of any cache, in such a step
MISTAKES = [
    (lambda c, k: c.commit(torch.tensor([[0]])), r"path must be \(b, m <= 3\) with b = 2"),
    (lambda c, k: c.commit(torch.tensor([[0], [3]])), "offsets from -1 to 2"),
    (lambda c, k: c.begin(3, padding=torch.zeros(2, 2, dtype=torch.bool)), r"padding must be \(b, n\) = \(2, 3\)"),
    (lambda c, k: c.begin(3, tree=torch.ones(2, 2, dtype=torch.bool)), "tree must be bool"),
]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *MISTAKES,
        (lambda c, k: c.append(0, k[:, :, :2], k[:, :, :2]), "the open step has 3 tokens, got k of shape"),
        (lambda c, k: c.append(0, k.clone().requires_grad_(), k), "require gradients cannot be cached"),
        (lambda c, k: c.begin(3, padding=torch.ones(2, 4, dtype=torch.bool)), r"got \(2, 4\)"),
        (lambda c, k: c.begin(3, tree=torch.ones(3, 3)), "tree must be bool"),
        (lambda c, k: c.begin(0), "0 tokens after 0 do not fit"),
    ],
)
def test_errors(call, message):
    refuses(new_cache(2), call, message)


def test_keys_are_cast_to_the_type_of_the_cache():
    cache = new_cache(1, dtype=torch.bfloat16)
    cache.begin(2)
    k_all, v_all = cache.append(0, torch.ones(1, H_KV, 2, D), torch.ones(1, H_KV, 2, D))
    assert k_all.dtype == v_all.dtype == torch.bfloat16
