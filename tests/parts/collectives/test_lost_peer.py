"""A rank that dies, stops or differs ends the others within the bound, and they name it."""

from __future__ import annotations

import itertools

import pytest
from tests.parts.collectives import programs
from tests.parts.collectives.ranks import Ranks

from volvelle.parts.collectives.wire import GRACE

TIMEOUT = 3.0
SLACK = 3.0
LOSSES = [
    *itertools.product(["dead", "stopped"], ["before", "middle"], ["ring", "tree"], [2]),
    ("dead", "middle", "halving-doubling", 1),
    ("stopped", "middle", "recursive-doubling", 3),
]
STORES = [("dead", 0), ("stopped", 0)]
DIFFERENCES = ["count", "dtype", "op", "algorithm", "sizes", "call"]


@pytest.fixture(scope="module")
def all_at_once():
    """Every scenario has ranks of its own, and all wait for their time-outs together."""
    running = {}
    try:
        for how, when, algorithm, victim in LOSSES:
            ranks = running[how, when, algorithm, victim] = Ranks(4)
            ranks.start(programs.lose, victim, how, when, algorithm, TIMEOUT)
        for how, victim in STORES:
            ranks = running[how, victim] = Ranks(3, store_in_rank_0=True)
            ranks.start(programs.lose, victim, how, "middle", "ring", TIMEOUT)
        for how in DIFFERENCES:
            ranks = running[how] = Ranks(3)
            ranks.start(programs.disagree, how, 1, TIMEOUT)
        yield running
    finally:
        for ranks in running.values():
            ranks.close()


@pytest.mark.parametrize(("how", "when", "algorithm", "victim"), LOSSES)
def test_survivors_name_the_lost_rank(all_at_once, how, when, algorithm, victim):
    ranks = all_at_once[how, when, algorithm, victim]
    for rank in set(range(4)) - {victim}:
        message, lost, seconds = ranks.result(rank)
        assert lost == victim, message
        assert message.startswith(f"all_reduce ({algorithm}): rank {victim} is lost; rank {rank} was waiting for")
        assert seconds <= TIMEOUT + GRACE + SLACK
    ranks.close()
    assert not any(process.is_alive() for process in ranks.processes)


@pytest.mark.parametrize(("how", "victim"), STORES)
def test_the_rank_that_holds_the_store_is_named_too(all_at_once, how, victim):
    ranks = all_at_once[how, victim]
    for rank in (1, 2):
        message, lost, seconds = ranks.result(rank)
        assert lost == 0, message
        assert seconds <= TIMEOUT + GRACE + 1.0 + SLACK


@pytest.mark.parametrize("how", DIFFERENCES)
def test_ranks_that_do_not_mean_the_same_say_so(all_at_once, how):
    """Nothing is reduced into a wrong result, nothing hangs, and the message holds both sides."""
    answers = [all_at_once[how].result(rank) for rank in range(3)]
    expected = {
        "count": ("sum of 10 x float32", "sum of 12 x float32"),
        "dtype": ("sum of 10 x float32", "sum of 10 x int32"),
        "op": ("sum of 10 x float32", "max of 10 x float32"),
        "algorithm": ("all_reduce (ring) sum", "all_reduce (tree) sum"),
        "sizes": ("blocks 3, 3, 3", "blocks 4, 3, 3"),
        "call": ("all_reduce (ring) sum of 10 x float32", "reduce_scatter (ring) sum of float32 blocks 10, 10, 10"),
    }[how]
    for kind, text in answers:
        assert kind == "RanksDisagree", text
        assert all(side in text for side in expected), text
