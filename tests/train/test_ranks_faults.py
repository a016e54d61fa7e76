"""A rank that dies, stops, or fails ends all ranks, which name it; the checkpoints stay."""

from __future__ import annotations

import os
import signal
import time

import pytest
from tests.train.many import Many
from tests.train.programs import Fault, train
from tests.train.toys import Folder

from volvelle.train.checkpoint import Checkpoints
from volvelle.train.options import FitOptions

TIMEOUT = 2.0
STEPS = 40


def options(world, **more):
    return FitOptions(steps=STEPS, batch=4, accumulate=2, checkpoint_every=3, ranks=world, rank_timeout=TIMEOUT, **more)


def faulty(tmp_path, world, *faults, **more):
    chosen = options(world, **more)
    many = Many(
        tmp_path / "said", world, chosen, train, tmp_path, "Regression", chosen, folder=tmp_path / "run", faults=faults
    )
    outcomes = many.wait(60)
    assert many.late == [], "no rank may be left over"
    return many, outcomes


def check(tmp_path, world, outcomes, lost, how):
    for rank in set(range(world)) - {lost}:
        assert outcomes[rank] is not None, f"rank {rank} left without a word"
        assert outcomes[rank]["error"] == "RankLost", outcomes[rank]
        assert f"rank {lost} is lost: {how}" in outcomes[rank]["text"]
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    newest = checkpoints.steps()[-1]
    survivor = 1 if lost == 0 else 0
    assert f"the checkpoint of step {newest} is intact" in outcomes[survivor]["text"]
    checkpoints.load(newest)
    assert all(record["step"] < STEPS for record in Folder(tmp_path / "run").metrics())


@pytest.mark.parametrize("place", ["loss", "transfer"])
@pytest.mark.parametrize(
    ("number", "how"), [(signal.SIGKILL, "its process died"), (signal.SIGSTOP, f"no sign of life for {TIMEOUT:g} s")]
)
def test_a_lost_rank_ends_all_before_and_in_a_transfer(place, number, how, tmp_path):
    """In a transfer: of the four waits that the ring's two messages of a bucket need, after the first."""
    count = 30 if place == "loss" else 31
    lost = 1 if place == "loss" else 0
    _, outcomes = faulty(tmp_path, 2, Fault(lost, place, count, number), all_reduce="ring")
    assert outcomes[lost] is None
    check(tmp_path, 2, outcomes, lost, how)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("hook", ["torch", "ring"])
def test_three_ranks_name_the_one_that_began_it(number, lost, hook, tmp_path):
    how = "its process died" if number == signal.SIGKILL else "no sign of life"
    _, outcomes = faulty(tmp_path, 3, Fault(lost, "loss", 29, number), all_reduce=hook)
    check(tmp_path, 3, outcomes, lost, how)


def test_a_rank_that_fails_is_named_with_its_reason(tmp_path):
    chosen = options(2)
    many = Many(tmp_path / "said", 2, chosen, train_and_trip, tmp_path, chosen)
    first, second = many.wait(60)
    assert second["error"] == "ZeroDivisionError"
    assert first["error"] == "RankLost"
    assert "rank 1 failed: ZeroDivisionError: tripped; every rank stops" in first["text"]


class Trip(Fault):
    def hit(self):
        self.count -= 1
        if self.count == 0:
            raise ZeroDivisionError("tripped")


def train_and_trip(ranks, out, chosen):
    return train(ranks, out, "Regression", chosen, folder=out / "run", faults=[Trip(1, "loss", 9)])


def test_sigterm_to_one_rank_saves_and_stops_all(tmp_path):
    _, outcomes = faulty(tmp_path, 2, Fault(1, "loss", 11, signal.SIGTERM))
    found = [outcome["value"] for outcome in outcomes]
    assert {value["interrupted"] for value in found} == {"SIGTERM"}
    assert {value["step"] for value in found} == {6}
    assert found[0]["said"][-1] == f"SIGTERM: stopped after step 6 of {STEPS}"
    assert found[1]["said"] == []
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == 6


def test_a_pause_of_all_ranks_is_no_loss(tmp_path):
    """Ctrl-Z and fg: the clock has moved on for everybody, and nobody is accused."""
    chosen = FitOptions(steps=400, batch=4, ranks=2, rank_timeout=1.0)
    many = Many(tmp_path / "said", 2, chosen, train, tmp_path, "Regression", chosen, folder=tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 30
    while not (metrics.exists() and metrics.stat().st_size > 3000) and time.monotonic() < until:
        time.sleep(0.02)
    for process in many.processes:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    assert many.outcomes == [None, None]
    for process in many.processes:
        os.kill(process.pid, signal.SIGCONT)
    assert [outcome["value"]["step"] for outcome in many.wait(60)] == [400, 400]
