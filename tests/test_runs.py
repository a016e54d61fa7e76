import json
import math
import multiprocessing
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from volvelle.errors import UsageError, VolvelleError
from volvelle.runs import RunFolder, plain, scan

CONFIG = {
    "model": "smollm2",
    "method": "lora",
    "data": Path("a/b.jsonl"),
    "targets": ("q_proj", "v_proj"),
    "rate": 2e-4,
}


def make(root, name=None, **options):
    return RunFolder.create(name, root=root, kind="adapt", config=CONFIG, **options)


def test_names_are_built_from_kind_model_and_method_and_count_up(tmp_path):
    assert [make(tmp_path).path.name for _ in range(3)] == [f"adapt-smollm2-lora-{i}" for i in (1, 2, 3)]
    config = {"model": "Qwen/Qwen2-0.5B@main"}
    assert RunFolder.create(root=tmp_path, kind="eval", config=config).path.name == "eval-qwen2-0.5b-1"
    assert RunFolder.create(root=tmp_path, kind="train language", config={}).path.name == "train-language-1"


def _make_many(root, names):
    for _ in range(10):
        names.put(make(root).path.name)


def test_two_processes_never_get_the_same_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    names = context.Queue()
    children = [context.Process(target=_make_many, args=(tmp_path, names)) for _ in range(3)]
    for child in children:
        child.start()
    got = [names.get(timeout=60) for _ in range(30)]
    for child in children:
        child.join()
    assert sorted(got) == sorted(f"adapt-smollm2-lora-{i}" for i in range(1, 31))


def test_given_name(tmp_path):
    run = make(tmp_path, "tour")
    (run.path / "weights" / "old").write_text("x")
    with pytest.raises(VolvelleError, match="already exists"):
        make(tmp_path, "tour")
    assert not (make(tmp_path, "tour", replace=True).path / "weights" / "old").exists()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(VolvelleError, match="already exists"):
        make(tmp_path, "precious", replace=True)
    assert (tmp_path / "precious" / "thesis.txt").exists()
    for wrong in ("../up", "a/b", "", ".."):
        with pytest.raises(UsageError, match="one folder name"):
            make(tmp_path, wrong)


def test_files_of_a_run(tmp_path):
    run = make(tmp_path)
    assert sorted(p.name for p in run.path.iterdir()) == [
        "adapter", "checkpoints", "config.yaml", "env.json", "manifest.json", "weights"
    ]  # fmt: skip
    expected = {**CONFIG, "data": "a/b.jsonl", "targets": ["q_proj", "v_proj"]}
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == expected == run.config()
    env = json.loads((run.path / "env.json").read_text())
    assert env["packages"]["torch"]
    assert env["cpus"] == os.cpu_count()
    manifest = RunFolder.open(run.path).manifest
    assert manifest == run.manifest
    assert {k: manifest[k] for k in ("kind", "status", "base_model")} == {
        "kind": "adapt", "status": "running", "base_model": "smollm2"
    }  # fmt: skip


def test_no_torch_is_imported():
    script = "import sys, volvelle.runs as r; r.environment(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_update_manifest(tmp_path):
    run = make(tmp_path)
    run.update_manifest(status="finished", loss=math.nan, best=Path("x"))
    again = RunFolder.open(run.path)
    assert (again.status, again.manifest["loss"], again.manifest["best"]) == ("finished", "NaN", "x")
    assert again.manifest["ended"]
    with pytest.raises(ValueError, match="status must be one of"):
        run.update_manifest(status="done")


def test_status_of_a_killed_run(tmp_path):
    script = (
        "import sys; from volvelle.runs import RunFolder; RunFolder.create('r', root=sys.argv[1], kind='x', config={})"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True)
    assert RunFolder.open(tmp_path / "r").status == "interrupted"
    assert make(tmp_path).status == "running"


def test_metrics_round_trip(tmp_path):
    import numpy as np
    import torch

    run = make(tmp_path)
    run.log({"step": 1, "loss": torch.tensor(2.5), "lr": np.float32(0.5), "split": "train"})
    run.log({"step": 2, "loss": math.nan, "norm": math.inf})
    first, second = RunFolder.open(run.path).metrics()
    assert first == {"step": 1, "loss": 2.5, "lr": 0.5, "split": "train"}
    assert math.isnan(second["loss"])
    assert second["norm"] == math.inf
    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "{", '{"step": 3}', '{"text": "caf\xc3'])
def test_torn_last_line_is_left_out_and_cut_before_more(tmp_path, torn):
    run = make(tmp_path)
    run.log({"step": 1})
    with open(run.path / "metrics.jsonl", "a", encoding="latin-1") as file:
        file.write(torn)
    again = RunFolder.open(run.path)
    assert again.metrics() == [{"step": 1}]
    again.log({"step": 2})
    assert again.metrics() == [{"step": 1}, {"step": 2}]


def test_broken_line_in_the_middle_is_named(tmp_path):
    run = make(tmp_path)
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step\n{"step": 3}\n')
    with pytest.raises(VolvelleError, match=r"metrics\.jsonl:2"):
        run.metrics()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no manifest"), ("{", "not readable as JSON"), ("[]", "names no kind"), ("{}", "names no kind")],
)
def test_open_refuses_what_is_no_run(tmp_path, content, message):
    folder = tmp_path / "thing"
    folder.mkdir()
    if content is not None:
        (folder / "manifest.json").write_text(content)
    with pytest.raises(VolvelleError, match=message):
        RunFolder.open(folder)


def test_open_suggests(tmp_path):
    make(tmp_path)
    with pytest.raises(UsageError, match="no such run folder") as caught:
        RunFolder.open(tmp_path / "adapt-smolm2-lora-1")
    assert "adapt-smollm2-lora-1" in caught.value.tip
    with pytest.raises(UsageError):
        RunFolder.open(tmp_path / "none" / "x")


def test_scan_lists_runs_only(tmp_path):
    first, second = make(tmp_path), make(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    assert [run.path for run in scan(tmp_path)] == [first.path, second.path]
    assert scan(tmp_path / "nowhere") == []


def test_plain_takes_nested_dataclasses():
    @dataclass(frozen=True)
    class Lora:
        rank: int = 8
        targets: tuple[str, ...] = ("q",)

    assert plain({"lora": Lora(), 1: {"a": {2}}}) == {"lora": {"rank": 8, "targets": ["q"]}, "1": {"a": [2]}}
