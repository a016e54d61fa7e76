"""Texts that come and go: every row of a SeatCache is what a cache of its own would be."""

import pytest
import torch

from volvelle.parts.attention.attention import attention
from volvelle.parts.attention.cache import KVCache
from volvelle.parts.attention.seat_cache import SeatCache

LAYERS, ROWS, HEADS, ROOM, WIDTH = 2, 3, 2, 40, 4
SIZES = {"layers": LAYERS, "kv_heads": HEADS, "context": ROOM, "head_width": WIDTH, "dtype": torch.float64}


class Alone:
    """The oracle: one cache a row."""

    def __init__(self):
        self.rows = [KVCache.allocate(batch=1, **SIZES) for _ in range(ROWS)]

    def step(self, q, k, v, padding, tree, kept):
        """Outputs (layers, b, h, n, d), 0 where there is padding, and positions (b, n); keeps `kept` of each row."""
        out, at = torch.zeros_like(q), torch.full(q.shape[1::2][:2], -1)
        for row, cache in enumerate(self.rows):
            real = slice(None) if padding is None else padding[row].nonzero()[:, 0]
            n = q.shape[3] if padding is None else len(real)
            if n == 0:
                continue
            own = None if tree is None else (tree if tree.dim() == 2 else tree[row])
            step = cache.begin(n, tree=own)
            at[row, real] = step.positions[0]
            for layer in range(LAYERS):
                keys, values = cache.append(
                    layer, k[layer, row : row + 1][:, :, real], v[layer, row : row + 1][:, :, real]
                )
                found = attention(q[layer, row : row + 1][:, :, real], keys, values, mask=step.mask, causal=step.causal)
                out[layer, row, :, real] = found[0]
            cache.commit(None if kept is None else torch.tensor([kept[row]], dtype=torch.long))
        return out, at


def together(cache, q, k, v, padding, tree, kept):
    step = cache.begin(q.shape[3], padding=padding, tree=tree)
    out = []
    for layer in range(LAYERS):
        keys, values = cache.append(layer, k[layer], v[layer])
        out.append(attention(q[layer], keys, values, mask=step.mask, causal=step.causal))
    if kept is None:
        cache.commit()
    else:
        widest = max(map(len, kept))
        cache.commit(torch.tensor([row + [-1] * (widest - len(row)) for row in kept], dtype=torch.long))
    return torch.stack(out), step.positions.expand(ROWS, -1)


def random_step(generator):
    """What a step may be: a prompt with padding, a chain of which rows keep parts, or a tree with a path each."""

    def draw(high):
        return int(torch.randint(high, (), generator=generator))

    kind, n = ("padded", "chain", "tree", "plain")[draw(4)], 1 + draw(4)
    q, k, v = (torch.randn(LAYERS, ROWS, HEADS, n, WIDTH, dtype=torch.float64, generator=generator) for _ in range(3))
    padding = tree = kept = None
    if kind == "padded":
        padding = torch.rand(ROWS, n, generator=generator) < 0.6
    elif kind == "chain":
        kept = [list(range(draw(n + 1))) for _ in range(ROWS)]
    elif kind == "tree":
        parents = [-1] + [draw(i) for i in range(1, n)]
        tree = torch.eye(n, dtype=torch.bool)
        for node, parent in enumerate(parents):
            if parent >= 0:
                tree[node] |= tree[parent]
        kept = [tree[draw(n)].nonzero()[:, 0].tolist() for _ in range(ROWS)]
        if draw(2):
            tree = tree.expand(ROWS, n, n)
    return q, k, v, padding, tree, kept


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("reach", [None, ROOM])
def test_every_row_is_a_cache_of_its_own(seed, reach):
    generator, cache, alone = torch.Generator().manual_seed(seed), SeatCache.allocate(batch=ROWS, **SIZES), Alone()
    cache.reach = reach
    for number in range(14):
        step = random_step(generator)
        if int(cache.lengths.max()) + step[0].shape[3] > ROOM:
            break
        found, at = together(cache, *step)
        expected, places = alone.step(*step)
        real = places >= 0
        assert torch.equal(at[real], places[real])
        shown = real[None, :, None, :, None]
        assert torch.allclose(found * shown, expected * shown, atol=1e-12)
        assert cache.lengths.tolist() == [one.length for one in alone.rows]
        if number % 4 == 3:  # somebody leaves, and another text takes the seat
            row = number % ROWS
            text = KVCache.allocate(batch=1, **SIZES)
            text.begin(3)
            k, v = torch.randn(2, LAYERS, 1, HEADS, 3, WIDTH, dtype=torch.float64, generator=generator)
            for layer in range(LAYERS):
                text.append(layer, k[layer], v[layer])
            text.commit()
            cache.adopt(row, text)
            alone.rows[row] = text


def test_a_step_that_is_not_committed_leaves_nothing():
    cache = SeatCache.allocate(batch=ROWS, **SIZES)
    cache.begin(2)
    assert cache.begin(1).positions.tolist() == [[0], [0], [0]]
    assert cache.length == 0


def test_positions_of_keys_count_the_trees_own_along_their_paths():
    cache = SeatCache.allocate(batch=2, **SIZES)
    cache.begin(2)
    cache.commit(torch.tensor([[0, 1], [0, -1]]))
    tree = torch.tensor([[True, False, False], [True, True, False], [True, False, True]])
    step = cache.begin(3, tree=tree)
    assert step.positions.tolist() == [[2, 3, 3], [1, 2, 2]]
    assert cache.key_positions(step.positions).tolist() == [[0, 1, 2, 3, 3], [0, 1, 2, 2, 4]]


def test_what_is_forgotten_makes_room_and_loses_snapshots():
    cache = SeatCache.allocate(batch=2, **{**SIZES, "context": 4})
    cache.begin(3)
    cache.commit()
    before = cache.snapshot()
    cache.begin(1)
    cache.commit()
    cache.restore(before)
    assert cache.lengths.tolist() == [3, 3]
    with pytest.raises(ValueError, match=r"2 tokens after 3 do not fit into a context of 4 \(row 0\)"):
        cache.begin(2)
    cache.forget(torch.tensor([0, 1]))
    assert cache.begin(4).causal
    with pytest.raises(ValueError, match="the snapshot was lost"):
        cache.restore(before)


def test_rows_can_be_moved():
    cache = SeatCache.allocate(batch=2, **SIZES)
    cache.begin(2)
    k = torch.arange(2.0, dtype=torch.float64)[:, None, None, None].expand(2, HEADS, 2, WIDTH)
    for layer in range(LAYERS):
        cache.append(layer, k, k)
    cache.commit(torch.tensor([[0, 1], [0, -1]]))
    cache.reorder(torch.tensor([1, 0, 1]))
    assert cache.lengths.tolist() == [1, 2, 1]
    cache.begin(1)
    keys, _ = cache.append(0, k.new_zeros(3, HEADS, 1, WIDTH), k.new_zeros(3, HEADS, 1, WIDTH))
    assert keys[:, 0, 0, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda c: c.adopt(0, KVCache.allocate(batch=2, **SIZES)), "one text without holes is wanted, got 2 rows"),
        (lambda c: c.begin(0), "a step has at least one token, got 0"),
        (lambda c: (c.begin(1), c.append(0, *[torch.zeros(ROWS, HEADS, 2, WIDTH)] * 2)), "the open step has 1 tokens"),
        (
            lambda c: c.begin(2, padding=torch.tensor([[True, False]] * ROWS), tree=torch.ones(2, 2).bool()),
            "padded or a tree",
        ),
    ],
)
def test_what_does_not_fit_is_said(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong(SeatCache.allocate(batch=ROWS, **SIZES))


def test_a_path_through_padding_is_refused():
    cache = SeatCache.allocate(batch=ROWS, **SIZES)
    cache.begin(2, padding=torch.tensor([[False, True]] * ROWS))
    with pytest.raises(ValueError, match="the path holds a token that is padding"):
        cache.commit(torch.tensor([[0], [1], [1]]))
