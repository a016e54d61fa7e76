"""Candidate trees: grown ones against every tree there is, static ones against the definition."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from volvelle.decode.trees import RankAcceptance, Tree, chain, expected_length, grow, product, values


def tables(count: int, heads: int, ranks: int):
    generator = random.Random(0)
    for _ in range(count):
        rows = [sorted((generator.random() for _ in range(ranks)), reverse=True) for _ in range(heads)]
        yield [[x / (sum(row) * generator.choice([1.0, 1.5, 3.0])) for x in row] for row in rows]


def every_tree(heads: int, ranks: int, size: int):
    """All sets of `size` paths that hold the beginning of each of their paths."""
    paths = [path for h in range(heads) for path in itertools.product(range(ranks), repeat=h + 1)]
    for chosen in itertools.combinations(paths, size):
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen):
            yield chosen


def paths_of(tree: Tree) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for parent, head, rank in zip(*tree, strict=True):
        found.append((*(() if parent < 0 else found[parent]), rank))
        assert len(found[-1]) == head + 1
    return found


@pytest.mark.parametrize("size", [1, 3, 5])
def test_no_tree_is_better_than_the_grown_one(size):
    for table in tables(8, heads=3, ranks=2):
        grown = grow(table, size)
        worth = {}
        for chosen in every_tree(3, 2, size):
            worth[chosen] = sum(
                torch.tensor([table[h][rank] for h, rank in enumerate(path)]).prod().item() for path in chosen
            )
        assert expected_length(grown, table) == pytest.approx(max(worth.values()), rel=1e-6)
        assert tuple(sorted(paths_of(grown))) in {tuple(sorted(chosen)) for chosen in worth}


def test_grown_trees_are_nested_and_grow_in_length():
    for table in tables(20, heads=4, ranks=5):
        whole = grow(table, 40)
        lengths = [expected_length(grow(table, size), table) for size in range(41)]
        assert all(before <= after for before, after in itertools.pairwise(lengths))
        assert all(whole.first(size) == grow(table, size) for size in range(0, 41, 7))
        falling = values(whole, table)
        assert falling == sorted(falling, reverse=True)
        assert all(parent < node for node, parent in enumerate(whole.parents))


def test_ranks_need_not_be_sorted_and_nothing_is_grown_in_vain():
    assert paths_of(grow([[0.1, 0.7], [0.0, 0.5]], 9)) == [(1,), (1, 1), (0,), (0, 1)]
    assert grow([], 4).size == 0
    assert grow([[0.5]], 0).size == 0
    assert grow([[0.0]], 3).size == 0


def test_static_trees():
    assert chain(0).size == chain(0).depth == 0
    assert chain(3) == Tree((-1, 0, 1), heads=(0, 1, 2), ranks=(0, 0, 0))
    assert chain(3).is_chain
    assert chain(3).depth == 3
    whole = product([2, 3, 1])
    assert whole.size == 2 + 6 + 6
    assert not whole.is_chain
    assert set(paths_of(whole)) == {p for h in range(3) for p in itertools.product(*map(range, [2, 3, 1][: h + 1]))}
    for budget in range(1, whole.size + 1):
        paths = set(paths_of(product([2, 3, 1], budget)))
        assert len(paths) == budget
        assert all(len(path) == 1 or path[:-1] in paths for path in paths)
    assert paths_of(product([2, 3, 1], 3)) == [(0,), (1,), (0, 0)]


def test_tokens_are_taken_from_the_heads_lists():
    candidates = torch.arange(24).view(2, 3, 4)  # rows, heads, ranks
    tree = grow([[0.5, 0.3, 0.1, 0.0], [0.4, 0.2, 0.1, 0.0], [0.9, 0.1, 0.0, 0.0]], 9)
    tokens = tree.tokens(candidates)
    assert tokens.shape == (2, 9)
    for row, node in itertools.product(range(2), range(9)):
        assert tokens[row, node] == candidates[row, tree.heads[node], tree.ranks[node]]


def test_measured_acceptance_is_found_and_followed():
    truth = [[0.5, 0.3, 0.1], [0.2, 0.5, 0.1]]
    generator, seen = random.Random(1), RankAcceptance(heads=2, ranks=3, memory=4000.0)

    def drawn(row):
        return generator.choices([0, 1, 2, None], [*row, 1 - sum(row)])[0]

    for _ in range(6000):
        first = drawn(truth[0])
        # The second head is judged only where the first was right.
        seen.observe([first, drawn(truth[1])] if first is not None else [first])
    assert seen.table[0] == pytest.approx(truth[0], abs=0.04)
    assert seen.table[1] == pytest.approx(truth[1], abs=0.04)
    assert paths_of(seen.tree(3)) == paths_of(grow(truth, 3))
    assert seen.expected_lengths(5) == pytest.approx(
        [expected_length(grow(seen.table, k), seen.table) for k in range(1, 6)]
    )
    for _ in range(20000):
        seen.observe([2, 0])
    assert paths_of(seen.tree(2)) == [(2,), (2, 0)]


def test_trees_between_readings_are_nested():
    seen = RankAcceptance(heads=3, ranks=4)
    big, small = seen.tree(20), seen.tree(6)
    seen.observe([3, 3, 3])
    assert big.first(6) == small == seen.tree(6)
    assert seen.tree(20) == big


def test_before_anything_was_seen():
    """prior * 2 ** -r as if seen `weight` times, or the measured table; older observations fade by 1 - 1 / memory."""
    assert RankAcceptance(heads=2, ranks=3).table == [[0.4, 0.2, 0.1]] * 2
    measured = RankAcceptance(heads=2, ranks=2, table=[[0.5, 0.3, 0.1], [0.2, 0.1, 0.0]], weight=4.0, memory=10.0)
    assert measured.table == [pytest.approx([0.5, 0.3]), pytest.approx([0.2, 0.1])]
    measured.observe([1])
    kept = 4.0 * 0.9
    assert measured.table[0] == pytest.approx([0.5 * kept / (kept + 1), (0.3 * kept + 1) / (kept + 1)])
    assert measured.table[1] == pytest.approx([0.2, 0.1]), "no more heads are judged than the step has new tokens"
    measured.observe([None, 0, 0])  # a head that there is none of
    assert measured.table[0][1] == pytest.approx((0.3 * kept + 1) * 0.9 / ((kept + 1) * 0.9 + 1))
    usual = RankAcceptance(heads=1, ranks=1)
    usual.observe([0])
    assert usual.table == [[pytest.approx((0.8 * 0.995 + 1) / (2 * 0.995 + 1))]]


def test_estimates_are_read_after_every_so_many_observations():
    seen = RankAcceptance(heads=1, ranks=3, prior=0.1)
    for observed in range(1, 16):
        assert paths_of(seen.tree(1)) == [(0,)]
        seen.observe([2])
        assert paths_of(seen.tree(1, every=99)) == [(0,)], f"asked for again after {observed}"
    assert paths_of(seen.tree(1)) == [(0,)]
    seen.observe([2])
    assert paths_of(seen.tree(1)) == [(2,)]
    for _ in range(60):
        seen.observe([1])
    seen.tree(1, every=99)
    assert paths_of(seen.tree(1, every=99)) == [(2,)]
    assert paths_of(seen.tree(2, every=99)) == [(1,), (2,)], "a larger tree is grown from what is known now"
    for _ in range(200):
        seen.observe([0])
    before = seen.tree(1)
    assert paths_of(before) == [(0,)]
    for _ in range(300):
        seen.observe([1])
    assert seen.tree(2, every=999).first(1) == before, "it was read at the larger size, so that trees are nested"
