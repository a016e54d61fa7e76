"""Timing all-reduces on real ranks, and the model made of the times: what is held out stays out."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

from volvelle.errors import VolvelleError
from volvelle.inspect import collectives
from volvelle.inspect.collectives import (
    FITTED,
    TWO_LEVEL,
    Calibration,
    Case,
    Rounds,
    agreement,
    calibrate,
    time_cases,
    worlds,
)
from volvelle.inspect.collectives_ranks import on_ranks
from volvelle.parts.collectives.model import Error, Fit

TRUTH = Fit(1e-5, 1e-9, 1e-6, 1e-10)
SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 22)


def table(truth=TRUTH, ranks=(2, 3, 4)):
    """What a machine that obeys the model exactly would be timed at."""
    cases = list(itertools.product((*FITTED, TWO_LEVEL), SIZES))
    return {
        p: {
            Case(name, size): Rounds([truth.seconds(name, p, size, nodes=2 if name == TWO_LEVEL else 1)] * 3, [], 0)
            for name, size in cases
            if name != TWO_LEVEL or p == 4
        }
        for p in ranks
    }


def test_timing_and_agreement_on_real_ranks():
    size = 8 << 20
    cases = [Case("gloo", size), Case("ring", size), Case("two-level", size)]
    found = time_cases(4, cases, rounds=2)
    assert all(len(case.wall) == len(case.cpu) == 2 and min(case.wall) > 0 for case in found.values())
    assert found[Case("ring", size)].sent == found[Case("two-level", size)].sent == 2 * 3 * size
    checked = agreement(2, count=1000)
    assert checked.error <= 1e-6
    assert (checked.differing, checked.most_sent) == (0, checked.share)


def restless(rank, cases, rounds, most):
    """Times that calm down only from the fifth time on, and that only the last rank sees."""
    seen = []

    def fake(case, x, repeats):
        seen.append(case)
        turn = len(seen) // len(cases)
        slow = rank == 1 and turn <= 4
        return 1.0 + slow * turn, 0.0, 0

    collectives._time, plain = fake, collectives._time
    try:
        return [one.wall for one in collectives._time_all(rank, cases, rounds, most, 1)], len(seen)
    finally:
        collectives._time = plain


@pytest.mark.parametrize(("most", "timed"), [(3, 4), (5, 6), (50, 7)])
def test_rounds_are_added_until_all_ranks_are_calm(most, timed):
    cases = [Case("ring", 64)]
    answers = on_ranks(2, restless, (cases, 3, most))
    assert [count for _, count in answers] == [timed, timed]
    assert answers[0][0] == [[1.0] * 3]
    assert (answers[1][0] == [[1.0] * 3]) == (most == 50)


def test_the_model_is_exact_where_the_machine_is():
    model = calibrate(table(), held_out_ranks=[4], held_out_sizes=SIZES[1::2])
    assert model.fit == pytest.approx(TRUTH, rel=1e-6)
    held_out = (model.held_out_sizes, model.held_out_ranks, model.held_out_algorithm)
    assert [error.count for error in held_out] == [16, 16, 4]
    assert max(error.worst for error in (model.fitted, *held_out)) < 1e-6


@pytest.mark.parametrize(
    ("spoilt", "shows"),
    [
        (lambda p, case: p == 4 and case.algorithm != TWO_LEVEL, "held_out_ranks"),
        (lambda p, case: p < 4 and case.size in SIZES[1::2], "held_out_sizes"),
        (lambda p, case: case.algorithm == TWO_LEVEL, "held_out_algorithm"),
    ],
)
def test_what_is_held_out_is_not_fitted(spoilt, shows):
    """Runs of one kind take twice as long: the fit does not notice, their own error does."""
    found = {
        p: {case: r._replace(wall=[2 * s for s in r.wall]) if spoilt(p, case) else r for case, r in cases.items()}
        for p, cases in table().items()
    }
    model = calibrate(found, held_out_ranks=[4], held_out_sizes=SIZES[1::2])
    assert model.fit == pytest.approx(TRUTH, rel=1e-6)
    for name in ("held_out_ranks", "held_out_sizes", "held_out_algorithm"):
        assert getattr(model, name).median == pytest.approx(0.5 if name == shows else 0.0, abs=1e-6)
    assert model.extrapolate((10,), 1 << 20, ("ring",))[0]["shared_error"] == pytest.approx(0.5)


def test_extrapolation_carries_the_worst_of_its_errors():
    errors = [Error(e, 2 * e, 9) for e in (0.1, 0.2, 0.3)]
    none = Error(float("nan"), float("nan"), 0)
    model = Calibration(TRUTH, 2, *errors, none, Error(0.4, 0.8, 9), [])
    rows = model.extrapolate((10, 10_000), 1 << 20, ("ring", TWO_LEVEL))
    assert [row["ranks"] for row in rows] == [10, 10, 10_000, 10_000]
    assert all((row["shared_error"], row["shared_worst"], row["apart_error"]) == (0.3, 0.6, 0.4) for row in rows)
    assert all(row["apart"] < row["shared"] for row in rows)


def test_worlds_hold_out_the_largest():
    assert worlds(4) == (2, 3, 4)
    assert worlds(2) == (2, 3)
    assert worlds(6)[-1] == 6


def fail(rank):
    if rank == 1:
        raise ValueError("rank 1 is unhappy")
    dist.all_reduce(torch.ones(1))


def die(rank):
    if rank == 1:
        os._exit(3)
    dist.all_reduce(torch.ones(1))


def sleep(rank):
    time.sleep(60 * rank)


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (fail, "collectives: rank 1: ValueError: rank 1 is unhappy"),
        (die, "collectives: rank (1 ended without an answer|0: .*)"),
        (sleep, "collectives: no answer from rank 0, 1 within 4 s"),
    ],
)
def test_a_rank_that_fails_is_named_and_no_process_is_left(program, says):
    before = set(multiprocessing.active_children())
    with pytest.raises(VolvelleError, match=says):
        on_ranks(2, program, limit=4.0 if program is sleep else 60.0)
    assert set(multiprocessing.active_children()) == before
