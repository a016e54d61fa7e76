"""Many ranks in fp16: they leave out the same updates, and loss scale and averages survive sharding and a resume."""

from __future__ import annotations

import shutil

import pytest
import torch
from tests.train.many import run
from tests.train.programs import train, train_language
from tests.train.toys import Folder

from volvelle.train.options import FitOptions

BASE = {"ranks": 2, "precision": "fp16", "average": 0.9, "on_nan": "skip"}


def go(folder, program, options, *arguments, **keywords):
    folder.mkdir(exist_ok=True)
    return [o["value"] for o in run(folder / "said", 2, options, program, folder, *arguments, options, **keywords)]


def weights(folder, rank):
    return torch.load(folder / f"rank-{rank}.pt")["weights"]


def test_ranks_leave_out_the_same_updates(tmp_path):
    """Sample 5 is NaN on one rank only; some updates overflow; afterwards the ranks have the same bits."""
    options = FitOptions(steps=7, batch=2, accumulate=2, checkpoint_every=None, **BASE)
    told = go(tmp_path, train, options, "Spoiled")
    assert told[0]["metrics"] == told[1]["metrics"]
    assert told[0]["metrics"]["skipped_nan"] >= 1
    a, b = weights(tmp_path, 0), weights(tmp_path, 1)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.isfinite(t).all() for t in a.values())
    assert any("left out" in text for text in told[0]["said"])


@pytest.mark.slow
def test_sharded_half_precision_is_unsharded_and_resumes_bit_for_bit(tmp_path):
    settings = {"steps": 6, "batch": 3, "accumulate": 2, "checkpoint_every": 2, "evaluate_every": 3, "keep_last": 3}
    whole, cut = FitOptions(**settings, **BASE), FitOptions(**settings, **BASE, shard="fsdp")
    go(tmp_path / "ddp", train_language, whole)
    go(tmp_path / "fsdp", train_language, cut)
    losses = [[r["loss"] for r in Folder(tmp_path / kind / "run").metrics() if "loss" in r] for kind in ("ddp", "fsdp")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    copied = tmp_path / "again"
    copied.mkdir()
    shutil.copytree(tmp_path / "fsdp" / "run", copied / "run")
    shutil.rmtree(copied / "run" / "checkpoints" / "step-00000006")
    told = go(copied, train_language, cut, resume=True)
    assert told[0]["resumed_from"] == 4
    ours, theirs = weights(copied, 0), weights(tmp_path / "fsdp", 0)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
