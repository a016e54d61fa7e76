"""Fully sharded data parallelism takes the same steps as whole weights on every rank; its checkpoints are as safe."""

from __future__ import annotations

import errno

import pytest
import torch
import torch.distributed as dist
from tests.train.many import Many, run
from tests.train.programs import train, train_language
from tests.train.toys import Folder
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.testing._internal.distributed.fake_pg import FakeStore

from volvelle.errors import UsageError
from volvelle.train.checkpoint import Checkpoints
from volvelle.train.options import FitOptions
from volvelle.train.sharded import ShardedGroup

BASE = {"steps": 6, "batch": 3, "accumulate": 2, "checkpoint_every": 2, "evaluate_every": 3, "keep_last": 3}


def losses(folder, name="loss"):
    return [record[name] for record in Folder(folder / "run").metrics() if name in record]


def weights(folder, rank=0):
    return torch.load(folder / f"rank-{rank}.pt")


def go(folder, world, program, options, *arguments, **keywords):
    folder.mkdir(exist_ok=True)
    return [o["value"] for o in run(folder / "said", world, options, program, folder, *arguments, options, **keywords)]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """One run with sharded weights, and one with whole ones."""
    folder = tmp_path_factory.mktemp("fsdp")
    go(folder / "ddp", 2, train_language, FitOptions(ranks=2, **BASE))
    said = go(folder / "fsdp", 2, train_language, FitOptions(ranks=2, shard="fsdp", **BASE))
    return folder, said


def test_losses_and_weights_equal_those_of_ddp(sharded):
    folder, _ = sharded
    for name in ("loss", "gradient_norm", "held_out_loss"):
        a, b = losses(folder / "ddp", name), losses(folder / "fsdp", name)
        assert len(a) >= 3
        assert a == pytest.approx(b, rel=1e-5)
    ddp = weights(folder / "ddp")["weights"]
    for rank in (0, 1):
        found = weights(folder / "fsdp", rank)
        assert found["kind"] == "Decoder", "after training it is a plain module again"
        assert found["weights"].keys() == ddp.keys()
        for name, weight in ddp.items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(found["logits"], weights(folder / "ddp")["logits"], rtol=1e-3, atol=1e-4)


def test_a_sharded_checkpoint_has_a_file_a_rank_and_a_manifest_over_all(sharded):
    folder, _ = sharded
    checkpoints = Checkpoints(folder / "fsdp" / "run" / "checkpoints")
    assert checkpoints.steps()[-2:] == [4, 6]
    path = checkpoints.path(6)
    shards = {file.name for file in (path / "shards").glob("*.distcp")}
    assert shards == {"__0_0.distcp", "__1_0.distcp"}
    manifest = (path / "manifest.json").read_text()
    assert all(f"shards/{name}" in manifest for name in shards)


@pytest.mark.parametrize("damaged", [None, "shards/__1_0.distcp", "state.json"])
def test_resumed_from_shards_bit_for_bit(damaged, sharded, tmp_path):
    folder, _ = sharded
    import shutil

    shutil.copytree(folder / "fsdp" / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    if damaged:
        path = tmp_path / "run" / "checkpoints" / "step-00000004" / damaged
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    options = FitOptions(ranks=2, shard="fsdp", **BASE)
    earlier = Checkpoints(tmp_path / "run" / "checkpoints").steps()
    said = go(tmp_path, 2, train_language, options, resume=True, seed=9)
    assert said[0]["resumed_from"] == (earlier[-2] if damaged else 4)
    if damaged:
        assert "checkpoint of step 4 is corrupt and was passed over" in said[0]["said"][0]
    for rank in (0, 1):
        mine, whole = weights(tmp_path, rank)["weights"], weights(folder / "fsdp", rank)["weights"]
        assert all(torch.equal(mine[name], whole[name]) for name in whole)
    assert losses(tmp_path) == losses(folder / "fsdp")


def test_two_players_are_sharded_too(tmp_path):
    options = {"steps": 4, "batch": 4, "ranks": 2, "average": 0.5}
    go(tmp_path / "ddp", 2, train_players, FitOptions(**options))
    said = go(tmp_path / "fsdp", 2, train_players, FitOptions(shard="fsdp", **options))
    assert all(value["broken"] == [] for value in said)
    ddp, fsdp = weights(tmp_path / "ddp")["weights"], weights(tmp_path / "fsdp")["weights"]
    for name, weight in ddp.items():
        torch.testing.assert_close(fsdp[name], weight, rtol=1e-3, atol=1e-5)


def train_players(ranks, out, options):
    return train(ranks, out, "SteadyPlayers", options)


def test_hooks_are_for_whole_weights():
    with pytest.raises(UsageError, match="shard=ddp"):
        FitOptions(shard="fsdp", all_reduce="ring")


def test_a_full_disk_on_one_rank_stops_all_and_leaves_the_checkpoint_before(tmp_path):
    options = FitOptions(ranks=2, shard="fsdp", **BASE)
    outcomes = Many(tmp_path / "said", 2, options, train_on_a_full_disk, tmp_path, options).wait()
    assert [outcome["error"] for outcome in outcomes] == ["VolvelleError"] * 2
    for outcome in outcomes:
        assert "the disk is full; the checkpoint of step 3 is intact" in outcome["text"]
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.steps() == [2, 3]
    checkpoints.verify(3)
    assert list(checkpoints.folder.glob(".*")) == []


def train_on_a_full_disk(ranks, out, options):
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    original, calls = FileSystemWriter.write_data, []

    def write_data(*arguments):
        calls.append(1)
        if ranks.rank == 1 and len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    FileSystemWriter.write_data = write_data
    return train_language(ranks, out, options)


class Nested(nn.Module):
    """A model whose forward pass is a method of its own, as a segmenter's is."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 2)

    def scores(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def forward(self, x):
        return self.scores(x)


def test_rank_0_evaluates_alone_and_waits_for_nobody(monkeypatch):
    gathered = []
    gather = _fsdp_param_group.foreach_all_gather
    monkeypatch.setattr(_fsdp_param_group, "foreach_all_gather", lambda *a, **k: gathered.append(1) or gather(*a, **k))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model, group = Nested(), ShardedGroup()
        model.unused = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        group.prepare({"model": model}, methods=("scores",))
        with group.whole({"model": model}), torch.no_grad():
            gathered.clear()
            for _ in range(3):
                model(torch.ones(1, 4))
        assert not gathered
        model.scores(torch.ones(1, 4)).sum().backward()  # and training gathers again
        assert gathered
    finally:
        dist.destroy_process_group()
