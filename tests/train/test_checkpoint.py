from __future__ import annotations

import errno
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.train.toys import Folder, Regression, loader

from volvelle.errors import VolvelleError
from volvelle.train import checkpoint
from volvelle.train.checkpoint import Checkpoints, CorruptCheckpoint, pack, unpack
from volvelle.train.loop import fit
from volvelle.train.observer import Observer, Quiet
from volvelle.train.options import FitOptions
from volvelle.train.random_state import random_state, seed_all, set_random_state

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text(max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.uint32, torch.bool]).map(
        lambda dtype: torch.arange(5).to(dtype)
    ),
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers(0, 9), st.just("$tensor")), inner, max_size=3),
    ),
    max_leaves=8,
)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=150, deadline=None)
@given(trees)
def test_any_state_survives_the_disk(tmp_path_factory, tree):
    checkpoints = Checkpoints(tmp_path_factory.mktemp("state"))
    checkpoints.save(1, {"tree": tree})
    assert equal(checkpoints.load(1)["tree"], tree)


def test_what_cannot_be_stored_is_named():
    with pytest.raises(TypeError, match="cannot store set at /a/0"):
        pack({"a": [{1}]}, {})


def test_tensors_that_share_memory_are_stored_apart():
    base, tensors = torch.arange(6.0), {}
    tree = pack({"whole": base, "part": base[2:], "turned": base.view(2, 3).T}, tensors)
    back = unpack(tree, tensors)
    assert equal(back["turned"], base.view(2, 3).T.contiguous())
    back["whole"][2] = 9
    assert back["part"][0] == 2


def test_random_state_of_all_three_generators_round_trips(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.rand(), np.random.normal(), torch.rand(1).item()

    seed_all(4)
    draw()
    Checkpoints(tmp_path).save(1, random_state())
    expected = [draw() for _ in range(3)]
    set_random_state(Checkpoints(tmp_path).load(1))
    assert [draw() for _ in range(3)] == expected


def test_keeps_the_newest_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (5, 10, 15, 20, 25):
        checkpoints.save(step, {"step": step}, best=10)
    assert checkpoints.steps() == [10, 20, 25]


def test_what_was_written_last_is_kept_and_an_abandoned_future_is_not(tmp_path):
    checkpoints, said = Checkpoints(tmp_path, keep_last=1), []
    for step in (50, 100):
        checkpoints.save(step, {"step": step}, best=50)
    damage(checkpoints.path(100) / "state.json", "truncated")
    assert checkpoints.newest(said.append)[0] == 50
    checkpoints.save(60, {"step": 60}, best=50)
    assert checkpoints.steps() == [50, 60]
    assert checkpoints.load(60) == {"step": 60}


@pytest.mark.parametrize("killed", [True, False])
def test_a_replaced_checkpoint_is_there_whenever_the_writer_dies(tmp_path, monkeypatch, killed):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(5, {"made": 1})
    rename, calls = Path.rename, []

    def dies(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt if killed else OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt if killed else VolvelleError):
        checkpoints.save(5, {"made": 2})
    monkeypatch.undo()
    assert Checkpoints(tmp_path).newest(print) == (5, {"made": 1})
    checkpoints.save(6, {"made": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


def test_a_folder_with_checkpoints_is_not_begun_anew(tmp_path):
    options, run = FitOptions(steps=4), Folder(tmp_path)
    fit(Regression(), loader(), options=options, run=run, observer=Quiet(), until=2)
    with pytest.raises(VolvelleError, match="holds checkpoints already, the newest of step 2") as caught:
        fit(Regression(), loader(), options=options, run=run, observer=Quiet())
    assert "resume=True" in caught.value.tip
    assert fit(Regression(), loader(), options=options, run=run, observer=Quiet(), resume=True).resumed_from == 2


def test_an_evaluation_that_is_no_number_is_not_the_best_for_ever(tmp_path):
    class Late(Regression):
        def evaluate(self):
            self.evaluations += 1
            return {"loss": [math.nan, 0.5, math.nan, 0.1, 0.3][self.evaluations - 1]}

    run, options = Folder(tmp_path), FitOptions(steps=4, evaluate_every=1, keep_last=1)
    result = fit(Late(), loader(), options=options, run=run, observer=Quiet())
    assert result.best == {"step": 3, "loss": 0.1}
    assert Checkpoints(tmp_path / "checkpoints").steps() == [3, 4]


def test_best_checkpoint_of_a_run_is_kept(tmp_path):
    class Worsening(Regression):
        def evaluate(self):
            self.evaluations += 1
            return {"loss": {0: 9.0, 1: 3.0, 2: 1.0}.get(self.evaluations - 1, 5.0)}

    run = Folder(tmp_path)
    options = FitOptions(steps=12, evaluate_every=2, checkpoint_every=3, keep_last=1)
    result = fit(Worsening(), loader(), options=options, run=run, observer=Quiet())
    assert result.best == {"step": 4, "loss": 1.0}
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 12]


class Listener(Quiet):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "bit":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "bit", "empty", "missing"])
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_aloud_and_the_resume_is_exact(tmp_path, name, how):
    options = FitOptions(steps=9, checkpoint_every=3, keep_last=3)
    whole, part = Folder(tmp_path / "whole"), Folder(tmp_path / "part")
    a, b, ear = Regression(), Regression(), Listener()
    fit(a, loader(), options=options, run=whole, observer=Quiet())
    fit(b, loader(), options=options, run=part, observer=Quiet())
    damage(part.path / "checkpoints" / "step-00000009" / name, how)
    if how == "bit" and name == "manifest.json":
        pass  # a flipped bit in a digest, a name or a brace: each way the folder is not trusted
    resumed = Regression(seed=9)
    result = fit(resumed, loader(), options=options, run=part, observer=ear, resume=True)
    assert result.resumed_from in ((6, 9) if how == "bit" and name == "manifest.json" else (6,))
    if result.resumed_from == 6:
        assert "checkpoint of step 9 is corrupt" in ear.said[0]
    for p, q in zip(a.net.parameters(), resumed.net.parameters(), strict=True):
        assert torch.equal(p, q)
    Checkpoints(part.path / "checkpoints").load(9)


def test_when_all_are_corrupt_nothing_starts_over_in_silence(tmp_path):
    run = Folder(tmp_path)
    fit(Regression(), loader(), options=FitOptions(steps=2), run=run, observer=Quiet())
    damage(tmp_path / "checkpoints" / "step-00000002" / "state.json", "truncated")
    with pytest.raises(VolvelleError, match="all 1 checkpoints are corrupt"):
        fit(Regression(), loader(), options=FitOptions(steps=3), run=run, observer=Quiet(), resume=True)


def test_a_save_killed_half_way_leaves_no_checkpoint_that_loads(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": torch.ones(3)})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "sha256", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, {"x": torch.ones(3)})
    monkeypatch.undo()
    assert checkpoints.steps() == [1]
    assert list(tmp_path.glob(".step-*.part"))
    checkpoints.save(3, {"x": torch.ones(3)})
    assert not list(tmp_path.glob(".step-*.part"))


@pytest.mark.parametrize("where", ["save_file", "sync"])
def test_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, where):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": torch.ones(3)})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, where, full)
    with pytest.raises(VolvelleError, match=r"the disk is full; the checkpoint of step 1 is intact"):
        checkpoints.save(2, {"x": torch.ones(3)})
    monkeypatch.undo()
    assert checkpoints.steps() == [1]
    assert equal(checkpoints.load(1), {"x": torch.ones(3)})
    assert not list(tmp_path.glob(".step-*.part"))


def test_really_full_disk(small_disk):
    checkpoints = Checkpoints(small_disk)
    checkpoints.save(1, {"x": torch.ones(100_000)})
    with pytest.raises(VolvelleError, match=r"the disk is full; the checkpoint of step 1 is intact"):
        checkpoints.save(2, {"x": torch.ones(200_000)})
    assert checkpoints.steps() == [1]
    checkpoints.load(1)
    checkpoints.save(3, {"x": torch.ones(100_000)})


def test_corrupt_is_its_own_error(tmp_path):
    with pytest.raises(CorruptCheckpoint):
        Checkpoints(tmp_path).load(7)
    assert Checkpoints(tmp_path / "none").newest(Observer().say) is None
