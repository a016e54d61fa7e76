"""Many ranks train as one process with their global batch: gradients, losses, weights, messages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.train.many import run
from tests.train.programs import train

from volvelle.data.loader import Loader
from volvelle.errors import UsageError
from volvelle.train.launch import joined
from volvelle.train.options import FitOptions
from volvelle.train.ranks import Ranks

STEPS = 5  # of 4 x 2 samples out of 22: crosses an epoch, with a last batch of 2


def loaded(folder, rank=0):
    return torch.load(folder / f"rank-{rank}.pt")


def alone(folder, kind, options):
    """One process with the micro-batches of all ranks."""
    said = train(Ranks(), folder, kind, options)
    return said, loaded(folder)


def together(folder, world, kind, options):
    said = run(folder / "said", world, options, train, folder, kind, options)
    return said, [loaded(folder, rank) for rank in range(world)]


def relative(a, b):
    a, b = torch.cat([x.reshape(-1) for x in a]), torch.cat([x.reshape(-1) for x in b])
    return float((a - b).norm() / b.norm())


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 17), batch=st.integers(1, 5), world=st.integers(1, 4), rounds=st.integers(1, 9),
    stop=st.integers(0, 8),
)  # fmt: skip
def test_ranks_take_turns_and_have_one_cursor(samples, batch, world, rounds, stop):
    def made():
        return Loader(range(samples), batch, seed=3, collate=list)

    def endless(loader):
        while True:
            yield from loader

    whole = endless(made())
    expected = [next(whole).ids for _ in range(rounds * world)]
    cursors = []
    for rank in range(world):
        loader = made().split(rank, world)
        stream, found = endless(loader), []
        for step in range(rounds):
            if step == stop:  # interrupted and resumed
                resumed = made().split(rank, world)
                resumed.load_state_dict(loader.state_dict())
                loader, stream = resumed, endless(resumed)
            found.append(next(stream).ids)
        assert found == expected[rank::world]
        cursors.append(loader.state_dict())
    assert all(cursor == cursors[0] for cursor in cursors)


HOOKS = {
    "torch": {},
    "ring": {"all_reduce": "ring"},
    "bf16": {"compress": True},
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_those_of_one_process(hook, accumulate, tmp_path):
    check_gradients(2, hook, accumulate, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_of_three_ranks_are_those_of_one_process(hook, accumulate, tmp_path):
    check_gradients(3, hook, accumulate, tmp_path)


def check_gradients(world, hook, accumulate, tmp_path):
    options = {"steps": STEPS, "batch": 4}
    one, expected = alone(tmp_path / "one", "Plain", FitOptions(accumulate=accumulate * world, **options))
    many = FitOptions(accumulate=accumulate, ranks=world, **options, **HOOKS[hook])
    said, found = together(tmp_path, world, "Plain", many)
    bound = 2e-2 if hook == "bf16" else 1e-6
    assert len(expected["gradients"]) == STEPS
    for rank in range(world):
        for mine, whole in zip(found[rank]["gradients"], expected["gradients"], strict=True):
            assert relative(mine, whole) <= bound
        assert all(torch.equal(v, found[0]["weights"][k]) for k, v in found[rank]["weights"].items()), "ranks differ"
        metrics = said[rank]["value"]["metrics"]
        assert metrics["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-6 if hook != "bf16" else 1e-2)
    if hook == "bf16":
        assert relative(found[0]["gradients"][0], expected["gradients"][0]) > 1e-6, "nothing was rounded"


@pytest.fixture
def one_thread():
    """As each rank has it: sums of other orders would differ by more than the ranks do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_players_keep_apart_and_train_as_in_one_process(tmp_path, one_thread):
    options = {"steps": 4, "batch": 4}
    one, expected = alone(tmp_path / "one", "SteadyPlayers", FitOptions(accumulate=2, **options))
    said, found = together(tmp_path, 2, "SteadyPlayers", FitOptions(ranks=2, **options))
    assert all(outcome["value"]["broken"] == [] for outcome in said)
    for name, weight in expected["weights"].items():
        same = [torch.equal(found[0]["weights"][name], other["weights"][name]) for other in found]
        assert all(same), name
        # A bias in front of a batch norm has no gradient but rounding, of which Adam makes steps of full size.
        if "running" not in name and "num_batches" not in name and not name.endswith(".0.bias"):
            torch.testing.assert_close(
                found[0]["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert said[0]["value"]["metrics"]["critic_loss"] == pytest.approx(one["metrics"]["critic_loss"], rel=1e-4)


def test_unused_parameters_are_named_and_left_as_they_were(tmp_path):
    options = {"steps": 3, "batch": 4}
    one, expected = alone(tmp_path / "one", "Idle", FitOptions(accumulate=2, **options))
    said, found = together(tmp_path, 2, "Idle", FitOptions(ranks=2, **options))
    named = "step 1, phase 'fit': its loss does not reach 2 parameters: idle.weight, idle.bias"
    assert one["said"] == said[0]["value"]["said"] == [named]
    assert said[1]["value"]["said"] == [], "rank 0 speaks for all"
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found[1]["weights"][name], weight, rtol=1e-5, atol=1e-6)


def test_a_nan_on_one_rank_stops_all_with_its_samples(tmp_path):
    from tests.train.many import Many

    options = FitOptions(steps=9, batch=4, ranks=2)
    outcomes = Many(tmp_path / "said", 2, options, train, tmp_path, "Spoiled", options).wait()
    texts = {outcome["text"] for outcome in outcomes}
    assert {outcome["error"] for outcome in outcomes} == {"NonFinite"}
    assert len(texts) == 1, "all say the same"
    plan = Loader(range(22), 4, seed=0, collate=list).plan(0)
    batch = next(i for i, ids in enumerate(plan) if 5 in ids)
    (text,) = texts
    assert f"step {batch // 2 + 1}, rank {batch % 2}, phase 'fit'" in text
    assert ", ".join(map(str, plan[batch])) in text


def test_more_or_fewer_processes_than_asked_for_is_an_error(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UsageError, match="ranks=2: torchrun has started 3 processes"), joined(FitOptions(ranks=2)):
        pass
