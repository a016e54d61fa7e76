"""kill -9 at random points: losses and weights of the resumed run are those of one that was never killed, to the bit.

Points lie in the loss (inside phases, accumulations and at the borders of epochs), before an optimiser's step, and
inside the writing of a checkpoint (before it is flushed, hashed, renamed). Of two ranks a random one is killed; the
other ends by itself.
"""

from __future__ import annotations

import random
import signal

import pytest
import torch
from tests.train.many import Many, run
from tests.train.programs import Fault, train
from tests.train.toys import Folder

from volvelle.train.options import FitOptions

# 22 samples in batches of 4, the last of 2: six batches an epoch, so an epoch ends inside steps of 3 or 6 batches.
STEPS, EVERY = 15, 4
LOSSES = {
    "Regression": 3 * STEPS,
    "TwoPlayers": 3 * (2 * (STEPS - 1) + STEPS // 2),
    "Gamblers": 9 * STEPS,
    "Painters": 3 * (2 * STEPS - 2),
}  # calls a rank
PLACES = ("loss", "loss", "loss", "update", "sync", "sha256", "rename")


def options(world):
    return FitOptions(
        steps=STEPS,
        batch=4,
        accumulate=3,
        checkpoint_every=EVERY,
        evaluate_every=5,
        seed=3,
        ranks=world,
        rank_timeout=5,
    )


def points(kind, world, count, seed):
    """Random (rank, place, arrival), spread over the run."""
    draw, found = random.Random(f"{kind}/{world}/{seed}"), []
    while len(found) < count:
        place = draw.choice(PLACES)
        losses = LOSSES[kind]
        most = {"loss": losses, "update": losses // 3, "sync": 20, "sha256": 8, "rename": 4}[place]
        rank = draw.randrange(world) if place in ("loss", "update") else 0
        found.append(Fault(rank, place, draw.randint(1, most), signal.SIGKILL))
    return found


def go(folder, kind, world, *faults, **more):
    """Run all ranks; the outcomes, and whether the fault was reached."""
    chosen = options(world)
    many = Many(
        folder / "said", world, chosen, train, folder, kind, chosen, folder=folder / "run", faults=faults, **more
    )
    outcomes = many.wait(60)
    assert many.late == []
    return outcomes


def records(folder):
    found = [record for record in Folder(folder / "run").metrics() if record["event"] != "resume"]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in found]


def whole(tmp_path_factory, kind, world):
    folder = tmp_path_factory.mktemp(f"{kind}{world}")
    chosen = options(world)
    run(folder / "said", world, chosen, train, folder, kind, chosen, folder=folder / "run")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The run that was never killed, once for each kind and number of ranks."""
    made = {}

    def get(kind, world):
        if (kind, world) not in made:
            made[kind, world] = whole(tmp_path_factory, kind, world)
        return made[kind, world]

    return get


def check(tmp_path, uninterrupted, kind, world, fault):
    expected = uninterrupted(kind, world)
    outcomes = go(tmp_path, kind, world, fault)
    assert outcomes[fault.rank] is None, "the fault was not reached"
    for rank, outcome in enumerate(outcomes):
        if rank != fault.rank:
            assert outcome["error"] == "RankLost", outcome
    # Other initial weights and generators: all must come from the checkpoint, unless there is none yet.
    found = (
        list((tmp_path / "run" / "checkpoints").glob("step-*")) if (tmp_path / "run" / "checkpoints").exists() else []
    )
    for outcome in go(tmp_path, kind, world, resume=True, seed=77 if found else 1):
        assert "error" not in outcome, outcome
        assert (outcome["value"]["resumed_from"] is not None) == bool(found)
    assert records(tmp_path) == records(expected), "losses"
    for rank in range(world):
        mine, theirs = (torch.load(f / f"rank-{rank}.pt")["weights"] for f in (tmp_path, expected))
        assert mine.keys() == theirs.keys()
        assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []


QUICK = [("Regression", 2, 0), ("TwoPlayers", 2, 1), ("Gamblers", 1, 0), ("Painters", 1, 0)]


@pytest.mark.parametrize(("kind", "world", "i"), QUICK)
def test_killed_and_resumed_to_the_bit(kind, world, i, tmp_path, uninterrupted):
    check(tmp_path, uninterrupted, kind, world, points(kind, world, i + 1, "quick")[i])


@pytest.mark.slow
@pytest.mark.parametrize("i", range(20))
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", LOSSES)
def test_twenty_random_kill_points(kind, world, i, tmp_path, uninterrupted):
    fault = points(kind, world, 20, "slow")[i]
    print(fault)
    check(tmp_path, uninterrupted, kind, world, fault)
