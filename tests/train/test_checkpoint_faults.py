"""Checkpoints on a bad disk: any flipped bit or cut is seen, and a full disk costs no step that was kept."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.train.toys import Regression, TwoPlayers, loader

from volvelle.errors import VolvelleError
from volvelle.runs import RunFolder
from volvelle.train.checkpoint import Checkpoints, CorruptCheckpoint
from volvelle.train.loop import fit
from volvelle.train.observer import Quiet
from volvelle.train.options import FitOptions

FILES = ("tensors.safetensors", "state.json", "manifest.json")


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


class Whole:
    """A checkpoint, its state, and the bytes of its files."""

    def __init__(self, checkpoints):
        self.checkpoints, self.state = checkpoints, checkpoints.load(4)
        self.content = {name: (checkpoints.path(4) / name).read_bytes() for name in FILES}

    def put(self, name, data):
        (self.checkpoints.path(4) / name).write_bytes(data)

    def load(self):
        try:
            return self.checkpoints.load(4)
        finally:
            for name, data in self.content.items():
                self.put(name, data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = RunFolder.create("toy", root=folder, kind="toy", config={})
    fit(TwoPlayers(), loader(), options=FitOptions(steps=4), run=run, observer=Quiet())
    return Whole(Checkpoints(run.path / "checkpoints"))


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_seen_or_harmless(whole, name, place, bit):
    data = bytearray(whole.content[name])
    data[int(place * len(data))] ^= 1 << bit
    whole.put(name, data)
    try:
        assert same(whole.load(), whole.state)  # a flip in the manifest's own remarks
        assert name == "manifest.json"
    except CorruptCheckpoint:
        pass


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), zeros=st.booleans())
def test_any_cut_is_seen(whole, name, place, zeros):
    """A file that ends early, also one whose end a crashed file system filled with zeros."""
    data = whole.content[name]
    cut = data[: int(place * len(data))]
    rest = bytes(len(data) - len(cut)) if zeros else b""
    assume(cut + rest != data)
    whole.put(name, cut + rest)
    with pytest.raises(CorruptCheckpoint):
        whole.load()


class FillsUp(Regression):
    """At step 5 something else takes what is left of the disk, but for `left` bytes."""

    def __init__(self, disk, left):
        super().__init__()
        self.disk, self.left = disk, left

    def after_step(self, step):
        if step == 5:
            free = os.statvfs(self.disk)
            (self.disk / "other").write_bytes(bytes(free.f_bavail * free.f_frsize - self.left))


@pytest.mark.parametrize("small_disk", ["256k"], indirect=True)
@pytest.mark.parametrize("left", [4096, 0])
def test_a_run_whose_disk_fills_up_goes_on_exactly_when_there_is_room(small_disk, tmp_path, left):
    options = FitOptions(steps=9, checkpoint_every=3, log_every=1)
    whole, part = Regression(), Regression(seed=9)
    expected = fit(
        whole, loader(), options=options, run=RunFolder.create("a", root=tmp_path, kind="toy", config={}),
        observer=Quiet(),
    )  # fmt: skip
    run = RunFolder.create("b", root=small_disk, kind="toy", config={})
    with pytest.raises((VolvelleError, OSError)) as caught:
        fit(FillsUp(small_disk, left), loader(), options=options, run=run, observer=Quiet())
    if isinstance(caught.value, VolvelleError):
        assert "the disk is full; the checkpoint of step 3 is intact" in str(caught.value)
    else:
        assert "No space left" in str(caught.value)
    assert Checkpoints(run.path / "checkpoints").steps() == [3]
    (small_disk / "other").unlink()
    again = RunFolder.open(run.path)
    result = fit(part, loader(), options=options, run=again, observer=Quiet(), resume=True)
    assert result.resumed_from == 3
    assert result.steps == expected.steps
    assert all(torch.equal(p, q) for p, q in zip(whole.net.parameters(), part.net.parameters(), strict=True))
    losses = {record["step"]: record["loss"] for record in again.metrics() if "loss" in record}
    assert sorted(losses) == list(range(1, 10))
