"""The command line on several ranks: `ranks=2` and torchrun, interrupts, restarts."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from volvelle.runs import RunFolder
from volvelle.train.checkpoint import Checkpoints

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "some", "dogs", "came", "to", "see", "it", "there")
OPTIONS = (
    *("data=t.txt", "batch=2", "vocabulary=300", "device=cpu", "samples=2", "max_tokens=4", "held_out_size=4"),
    *("model.width=16", "model.depth=2", "model.heads=2", "model.context=32", "checkpoint_every=4", "rank_timeout=5"),
)
LIMIT = 150


@pytest.fixture
def folder(tmp_path):
    draw = random.Random(0)
    (tmp_path / "t.txt").write_text("\n".join(" ".join(draw.choices(WORDS, k=10)) for _ in range(300)))
    return tmp_path


def start(folder: Path, *words: str, by=("-m", "volvelle")) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VOLVELLE_")}
    return subprocess.Popen(
        [sys.executable, *by, *words],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"not done after {LIMIT} s:\n{out}\n{err}")
    return process.returncode, out, err


def until_saved(process: subprocess.Popen, run: Path) -> None:
    """Wait for the first checkpoint."""
    stop = time.monotonic() + LIMIT
    while time.monotonic() < stop and process.poll() is None:
        if Checkpoints(run / "checkpoints").steps():
            return
        time.sleep(0.05)
    code, out, err = end(process)
    pytest.fail(f"no checkpoint, exit code {code}:\n{out}\n{err}")


def workers(run: str) -> dict[int, int]:
    """Process number of each rank that works on the run."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(
                pair.split("=", 1) for pair in (entry / "environ").read_text().split("\0") if "=" in pair
            )
            command = (entry / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if run in command and "-m" in command and "RANK" in environment and "--nproc-per-node" not in command:
            found[int(environment["RANK"])] = int(entry.name)
    return found


def losses(run: Path) -> list[tuple]:
    return [(r["event"], r["step"], r.get("loss"), r.get("held_out_loss")) for r in RunFolder.open(run).metrics()
            if r["event"] != "resume"]  # fmt: skip


def test_sigterm_to_the_launcher_saves_and_says_once_how_to_go_on(folder):
    process = start(folder, "train", "language", *OPTIONS, "steps=9000", "ranks=2", "run=a")
    until_saved(process, folder / "runs" / "a")
    process.send_signal(signal.SIGTERM)
    code, out, err = end(process)
    assert code == 130, err
    assert (out + err).count("volvelle resume runs/a") == 1
    assert (out + err).count("everything is saved") == 1
    assert "Traceback" not in err
    run = RunFolder.open(folder / "runs" / "a")
    assert run.status == "interrupted"
    assert Checkpoints(run.path / "checkpoints").steps()[-1] == run.manifest["step"]
    assert workers("runs/a") == {}


@pytest.mark.slow
def test_torchrun_is_the_same_and_a_restart_goes_on_from_the_newest_checkpoint(folder):
    whole = start(folder, "train", "language", *OPTIONS, "steps=60", "ranks=2", "run=whole")
    assert end(whole)[0] == 0
    by = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
        "-m",
        "volvelle",
    )
    process = start(folder, "train", "language", *OPTIONS, "steps=60", "run=again", by=by)
    until_saved(process, folder / "runs" / "again")
    os.kill(workers("run=again")[1], signal.SIGKILL)
    code, out, err = end(process)
    assert code == 0, err
    assert "resumed from the checkpoint of step" in out
    assert losses(folder / "runs" / "again") == losses(folder / "runs" / "whole")
    assert (folder / "runs" / "again" / "weights" / "model.safetensors").read_bytes() == (
        folder / "runs" / "whole" / "weights" / "model.safetensors"
    ).read_bytes()
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["again", "whole"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "how"), [(signal.SIGKILL, "its process died"), (signal.SIGSTOP, "no sign of life")])
def test_a_lost_worker_is_named_and_the_run_can_go_on(number, how, folder):
    process = start(folder, "train", "language", *OPTIONS, "steps=9000", "ranks=2", "run=a", "shard=fsdp")
    until_saved(process, folder / "runs" / "a")
    os.kill(workers("runs/a")[1], number)
    code, _, err = end(process)
    assert code == 1
    assert f"error: rank 1 is lost: {how}" in err
    assert "is intact" in err
    assert "tip: volvelle resume runs/a" in err
    assert err.count("error:") == 1
    assert workers("runs/a") == {}
    again = start(folder, "resume", "runs/a")
    time.sleep(1)
    newest = Checkpoints(folder / "runs" / "a" / "checkpoints").steps()[-1]
    while again.poll() is None and Checkpoints(folder / "runs" / "a" / "checkpoints").steps()[-1] == newest:
        time.sleep(0.1)
    again.send_signal(signal.SIGTERM)
    code, out, err = end(again)
    assert code == 130, err
    assert f"resumed from the checkpoint of step {newest}" in out


@pytest.mark.slow
def test_adapt_runs_on_two_ranks(folder):
    assert end(start(folder, "train", "language", *OPTIONS, "steps=8", "run=base"))[0] == 0
    (folder / "pairs.txt").write_text("\n".join(f"the cat {i} || sat on a mat {i % 7}" for i in range(60)))
    options = [o for o in OPTIONS if not o.startswith(("model.", "vocabulary", "data"))]
    code, out, err = end(
        start(
            folder,
            "adapt",
            "runs/base",
            "data=pairs.txt",
            *options,
            "steps=6",
            "ranks=2",
            "run=fitted",
            "all_reduce=ring",
        )
    )
    assert code == 0, err
    assert (out + err).count("next     volvelle generate runs/fitted") == 1
    assert (folder / "runs" / "fitted" / "adapter" / "adapter_model.safetensors").is_file()
