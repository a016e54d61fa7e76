"""The claim on collectives: counts and equalities hold on any machine, times are only read, and mutants are caught."""

from __future__ import annotations

import pytest

from volvelle.claims import collectives
from volvelle.inspect import collectives as timing
from volvelle.inspect import collectives_ranks
from volvelle.inspect.collectives import Rounds


def with_mutants(rank, chosen):
    """On one of several ranks: the algorithms as they are, and with each of two faults."""
    from volvelle.parts.collectives import recursive_doubling, tree

    found = {"right": collectives.counted(rank, chosen)}
    reduce, swap_reduce = tree._reduce, recursive_doubling.swap_reduce

    def twice(wire, x, combine):
        reduce(wire, x, combine)
        reduce(wire, x.clone(), combine)

    def but_the_last(wire, give, keep, peer, combine):
        if abs(wire.rank - peer) < wire.size // 2:
            swap_reduce(wire, give, keep, peer, combine)

    tree._reduce = twice
    found["tree"] = collectives.counted(rank, chosen)
    tree._reduce, recursive_doubling.swap_reduce = reduce, but_the_last
    return {**found, "recursive-doubling": collectives.counted(rank, chosen)}


@pytest.fixture(scope="module")
def answers():
    """What ranks say, by their number; each is started once for all tests."""
    return {p: collectives_ranks.on_ranks(p, with_mutants, (collectives.cases(p),)) for p in (3, 4)}


@pytest.fixture
def measure(answers, monkeypatch):
    """The claim with one of the faults, and with times that do not depend on this machine."""

    def times(ranks, cases, *, rounds):
        slow = {"ring": 2.0, "halving-doubling": 1.5, "recursive-doubling": 1.0, "tree": 1.0, "two-level": 1.0}
        return {
            case: Rounds([slow[case.algorithm] if case.size < 1 << 20 else 3 - slow[case.algorithm]], [1.0], 0)
            for case in cases
        }

    def run(fault):
        monkeypatch.setattr(collectives_ranks, "on_ranks", lambda p, _, __: [answer[fault] for answer in answers[p]])
        return collectives.measure("quick")

    monkeypatch.setattr(timing, "time_cases", times)
    monkeypatch.setattr(collectives, "COUNTED", {"quick": (3, 4)})
    return run


def broken(found):
    return {finding.what.split(",")[0] for finding in found.findings if finding.held is False}


def test_counts_sums_and_bits_hold(measure):
    found = measure("right")
    assert found.verdict == "held"
    exact = [finding for finding in found.findings if "time of" not in finding.what]
    assert len(exact) == 25  # five for each algorithm
    assert all(finding.value == 0 for finding in exact if "difference from the formula" in finding.what)


@pytest.mark.parametrize("name", ["tree", "recursive-doubling"])
def test_a_wrong_algorithm_is_not_held(name, measure):
    """A tree whose children send everything twice; doubling without its last round, which leaves half of the sum."""
    found = measure(name)
    assert found.verdict == "not held"
    assert name in broken(found)
    assert "ring" not in broken(found)


def test_a_slower_algorithm_is_not_held():
    names, sizes = (*collectives.FLAT, collectives.TWO_LEVEL), (collectives.SHORT, collectives.LONG)
    found = {}
    for name in names:
        rounds = Rounds([1.0 + (name == "recursive-doubling")], [1.0], 0)
        found |= {timing.Case(name, size): rounds for size in sizes}
    held = [finding.held for finding in collectives._times(4, found)]
    assert held == [False, False, True, True, None, None, None, None, None, None]


@pytest.mark.parametrize(
    ("logs", "rounds"),
    [
        ([[(0, 1, 8)], [(0, 0, -8)]], 1),
        ([[(0, 1, -8)], [(0, 2, -8), (0, 0, 8)], [(0, 1, 8)]], 2),  # a chain
        ([[(0, 1, 8), (0, 2, 8)], [(0, 0, -8)], [(0, 0, -8)]], 2),  # one to two: one message at a time
    ],
)
def test_rounds_are_of_one_message_a_rank(logs, rounds):
    assert collectives.rounds_of(logs) == rounds
