"""The exact rule against itself written as a loop over one row's tokens, number by number."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from tests.decode.test_accept_exact import Row

from volvelle.decode import Sampling
from volvelle.decode.accept_exact import EXACT, children_of, keep_one
from volvelle.decode.contract import Draft

V = 6
SHAPES = {
    "chain": None,
    "siblings": (-1, -1, -1),
    "tree": (-1, -1, -1, 0, 0, 1, 3, 4, 4),
    "late children": (-1, 0, -1, 1, 2, 2),
}
"""Parents; a chain has three tokens."""


class Numbers:
    """A row's random numbers; `used` counts them."""

    def __init__(self, seed):
        self.used, self._random = 0, random.Random(seed)

    def __next__(self):
        self.used += 1
        return self._random.random()


def made(shape, seed, *, b=5, drawn=True, missing=0.2):
    """Logits (b, n, v) and a draft whose tokens are probable under p and q alike, some of them missing or repeated."""
    parents = SHAPES[shape]
    k = 3 if parents is None else len(parents)
    noise = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(b, 1 + k, V, generator=noise)
    ancestry = Draft(torch.zeros(1, k), parents).ancestry
    places = torch.tensor([1 + parent for parent in ancestry])
    q = (logits + torch.randn(b, 1 + k, V, generator=noise)).softmax(-1)
    q[..., 0] = 0  # a token that the draft cannot give
    q = (q / q.sum(-1, keepdim=True))[:, places]
    tokens = torch.multinomial(q.flatten(0, 1), 1, generator=noise).view(b, k)
    tokens[torch.rand(b, k, generator=noise) < missing] = -1
    tokens[torch.rand(b, k, generator=noise) < 0.05] = 0
    return logits, Draft(tokens, parents, q if drawn else None)


def walked(logits, tokens, parents, q, numbers):
    """One row: the accepted nodes and the tokens gained. logits (n, v), q (k, v) or None."""
    nodes, gained = [0], []
    while True:
        p = logits[nodes[-1]].softmax(-1).double().tolist()
        ways = [node for node, parent in enumerate(parents, 1) if parent + 1 == nodes[-1]]
        kept = None
        if q is not None:
            left = q[ways[0] - 1].double().tolist() if ways else []
            for way in ways:
                token = tokens[way - 1]
                if token < 0:
                    continue
                number, whole = next(numbers), sum(left)
                chance = left[token] / whole if whole else 0.0
                if chance > 0 and number < p[token] / chance:
                    kept = way
                    break
                rest = [max(a - b / whole, 0.0) for a, b in zip(p, left, strict=True)] if chance > 0 else []
                if sum(rest) > 0:
                    p = [a / sum(rest) for a in rest]
                left[token] = 0.0
        if kept is None:
            number, below, chosen = next(numbers) * sum(p), 0.0, 0
            while chosen < V - 1 and below + p[chosen] <= number:
                below += p[chosen]
                chosen += 1
            if q is None:
                kept = next((way for way in ways if tokens[way - 1] == chosen), None)
            if kept is None:
                return nodes, [*gained, chosen]
        nodes.append(kept)
        gained.append(tokens[kept - 1])


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "chosen"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_walked_as_the_loop_walks_them(shape, drawn):
    longest = 0
    for seed in range(25):
        logits, draft = made(shape, seed, drawn=drawn)
        numbers, alone = ([Numbers(10 * seed + i) for i in range(5)] for _ in range(2))
        rows = [Row(Sampling(temperature=1.0), each) for each in numbers]
        rows[2].finish = "eos"
        found = EXACT(logits, draft, rows)
        for i, own in enumerate(alone):
            if i == 2:
                assert found.tokens[i] == []
                assert found.path[i].eq(-1).all()
                assert numbers[i].used == 0
                continue
            q = None if draft.q is None else draft.q[i]
            nodes, gained = walked(logits[i], draft.tokens[i].tolist(), draft.ancestry, q, own)
            assert found.tokens[i] == gained
            assert found.path[i].tolist() == nodes + [-1] * (found.path.shape[1] - len(nodes))
            assert numbers[i].used == own.used, "a row takes as many random numbers as it needs, whoever sits beside it"
            longest = max(longest, len(nodes))
        assert found.path.shape[1] == max(map(len, found.nodes)) + 1
    assert longest > 2 or shape == "siblings"


def test_greedy_rows_beside_drawn_ones_take_their_likeliest_tokens():
    for seed in range(10):
        logits, draft = made("tree", seed)
        best = logits.argmax(-1)
        draft.tokens[0, :3] = torch.tensor([(best[0, 0] + 1) % V, best[0, 0], -1])
        rows = [Row(Sampling() if i == 0 else Sampling(temperature=1.0), Numbers(i)) for i in range(5)]
        found = EXACT(logits, draft, rows)
        assert found.path[0, :2].tolist() == [0, 2]
        assert found.tokens[0][0] == int(best[0, 0])
        at = found.path[0][found.path[0] >= 0][-1]
        assert found.tokens[0][-1] == int(best[0, at])
        all_greedy = EXACT(logits, draft, [Row(Sampling(), Numbers(i)) for i in range(5)])
        assert all_greedy.tokens[0] == found.tokens[0]
    assert EXACT.lossless(Sampling(temperature=1.0))


class Argmax(Row):
    def all_argmax(self, count):
        return True


@pytest.mark.parametrize("shape", SHAPES)
def test_the_quick_way_of_greedy_rows_is_the_general_one(shape):
    longest = 0
    for seed in range(25):
        logits, draft = made(shape, seed, drawn=False)
        quick, general = ([kind(Sampling(), Numbers(i)) for i in range(5)] for kind in (Argmax, Row))
        quick[2].finish = general[2].finish = "eos"
        found, expected = EXACT(logits, draft, quick), EXACT(logits, draft, general)
        assert found.tokens == expected.tokens
        assert torch.equal(found.path, expected.path)
        longest = max(longest, found.path.shape[1])
    assert longest > (1 if shape == "siblings" else 2)


def test_children_by_parents():
    assert children_of(Draft(torch.zeros(1, 3))) == ((1,), (2,), (3,), ())
    assert children_of(Draft(torch.zeros(1, 5), (-1, 0, -1, 0, 2))) == ((1, 3), (2, 4), (), (5,), (), ())


def tried(p, q, candidates, numbers):
    found, rest = keep_one(
        torch.tensor([p]), torch.tensor([q]), torch.tensor([candidates]), [functools.partial(next, iter(numbers))]
    )
    return found[0], rest[0].tolist()


def test_chances_are_compared_at_their_bounds():
    """min(1, p / q): kept below it, not at it; what remains is norm(max(p - q, 0))."""
    p, q = [0.25, 0.75], [0.5, 0.5]
    assert tried(p, q, [0], [0.5]) == (-1, [0.0, 1.0])
    assert tried(p, q, [0], [0.5 - 1e-12]) == (0, p)
    assert tried(p, q, [1], [1 - 1e-16]) == (0, p)
    # the second sibling is judged by what the first has left, of p and of q
    assert tried([0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0, 2], [0.9, 0.0]) == (-1, [0.0, 1.0, 0.0])
    found, rest = tried([0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0, 1], [0.9, 0.9])
    assert (found, rest) == (1, [0.0, 1.0, 0.0])
    assert tried([0.0, 1.0], [1.0, 0.0], [-1, 0], [0.0]) == (-1, [0.0, 1.0])
    # p = q but for what is kept: nothing is left over, and p stays what it was
    assert tried([0.0, 0.5, 0.5], [0.0, 0.5, 0.5], [0], [0.0]) == (-1, [0.0, 0.5, 0.5])
    # and where rounding alone makes p the smaller, a rejected token leaves p as it was
    found, rest = tried([0.5, 0.5 - 2**-24], [0.5, 0.5], [1], [1 - 2**-30])
    assert (found, rest) == (-1, [0.5, 0.5 - 2**-24])


def test_a_row_without_candidates_keeps_none():
    p = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    found, rest = keep_one(p, p, torch.full((2, 2), -1), [lambda: 0.0] * 2)
    assert found == [-1, -1]
    assert torch.equal(rest, p)
