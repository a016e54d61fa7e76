"""The verbs ls, get and doctor, through the command line."""

import json
import subprocess
import sys

import pytest

from volvelle import hub
from volvelle.claims.claim import names
from volvelle.cli import catalogue, diagnosis
from volvelle.cli.main import main
from volvelle.runs import RunFolder


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("VOLVELLE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("VOLVELLE_FASHION_MNIST", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def as_json(capsys, *words, code=0):
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_techniques_are_read_from_the_source_without_importing_it(tmp_path):
    folder = tmp_path / "parts" / "position"
    folder.mkdir(parents=True)
    (folder / "rope.py").write_text(
        '"""Rotary embedding (Su et al. 2021). More.\n\nBody."""\n'
        'raise SystemExit("imported")\n'
        '@export("functional.apply_rope", since="0.1")\ndef apply_rope(): pass\n'
        '@export(\n    "nn.RotaryEmbedding",\n    twin=apply_rope,\n    aliases=("nn.Rope",),\n)\n'
        "class RotaryEmbedding: pass\n"
        '@other("functional.no")\ndef no(): pass\n'
    )
    (folder / "helper.py").write_text('"""Not public."""\n')
    names = ("functional.apply_rope", "nn.RotaryEmbedding", "nn.Rope")
    title = "Rotary embedding (Su et al. 2021)"
    assert catalogue.techniques(tmp_path) == [catalogue.Technique("position", title, "parts/position/rope.py", names)]


def test_ls_techniques_agrees_with_the_public_names(capsys):
    import volvelle.functional
    import volvelle.nn

    listed = {name for row in as_json(capsys, "ls", "techniques")["techniques"] for name in row["names"]}
    public = {f"{m.__name__.rpartition('.')[2]}.{n}" for m in (volvelle.functional, volvelle.nn) for n in m.__all__}
    assert listed == public


def test_ls_shows_models_and_runs(capsys, tmp_path):
    run = RunFolder.create(root="runs", kind="adapt", config={"model": "smollm2"})
    run.update_manifest(status="finished")
    record = as_json(capsys, "ls")
    assert set(record) == {"techniques", "recipes", "claims", "models", "runs"}
    assert {item["name"] for item in record["claims"]} == set(names())  # as `volvelle claim NAME` takes them
    assert [(r["name"], r["status"], r["base_model"]) for r in record["runs"]] == [
        ("adapt-smollm2-1", "finished", "smollm2")
    ]
    assert {m["name"]: m["state"] for m in record["models"]} == dict.fromkeys(hub.ASSETS, "absent")
    assert main(["ls", "runs"]) == 0
    assert "adapt-smollm2-1  finished" in capsys.readouterr().out
    assert main(["ls", "runs", "runs=elsewhere"]) == 0
    assert "no runs in elsewhere/" in capsys.readouterr().out


def test_get_unknown_and_from(capsys, tmp_path):
    assert main(["get", "smolm2"]) == 2
    assert "tip: did you mean smollm2?" in capsys.readouterr().err
    assert main(["get", "countries", f"from={tmp_path / 'none.whl'}"]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main(["get", "owner/name", "from=x"]) == 2


def test_get_prints_path_size_licence_and_hash(capsys, tmp_path, monkeypatch):
    from volvelle.hub.assets import ASSETS, Asset, Member, Wheel

    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of b"abc"
    wheel = Wheel("toy", "1", "toy.whl", 1, "0" * 64)
    monkeypatch.setitem(
        ASSETS, "toy", Asset("toy", "model", "a toy", "MIT", wheel, (Member("m", "m.gguf", 3, digest),))
    )
    (tmp_path / "mine").write_bytes(b"abc")
    record = as_json(capsys, "get", "toy", "from=mine")
    assert record["path"].endswith("assets/toy/m.gguf")
    assert (record["bytes"], record["licence"], record["files"][0]["sha256"]) == (3, "MIT", digest)
    assert main(["get", "toy", "verify=true"]) == 0
    printed = capsys.readouterr().out
    assert "licence  MIT" in printed
    assert f"sha256   {digest}" in printed


def test_doctor_reports_every_check(capsys, home):
    record = as_json(capsys, "doctor")
    rows = {check["what"]: check for check in record["checks"]}
    assert {"python", "torch", "threads", "cpu", "memory", "store", "smollm2", "matmul float32"} <= set(rows)
    assert rows["matmul bfloat16"]["state"] == "ok"
    assert record["failures"] == 0


def test_doctor_fails_on_a_damaged_asset(capsys, home):
    folder = home / "assets" / "countries"
    folder.mkdir(parents=True)
    (folder / "countries.json").write_text("{}")
    (folder / "manifest.json").write_text('{"source": "x", "files": []}')
    record = as_json(capsys, "doctor", "compute=false", code=1)
    row = next(check for check in record["checks"] if check["what"] == "countries")
    assert row["state"] == "fail"
    assert row["tip"] == "volvelle get countries"


@pytest.mark.parametrize(("threads", "cores", "quota", "state"), [
    (8, 8, None, "ok"), (8, 4, None, "warn"), (4, 8, 2.0, "warn"), (2, 8, 2.0, "ok"),
    (1, 1, 0.5, "ok"), (1, 8, None, "warn"),
])  # fmt: skip
def test_threads_are_held_against_cores_and_quota(monkeypatch, threads, cores, quota, state):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(diagnosis, "allowed_cores", lambda: cores)
    monkeypatch.setattr(diagnosis, "cgroup_quota", lambda: quota)
    check = next(check for check in diagnosis.processor() if check.what == "threads")
    assert check.state == state
    assert (check.tip is None) == (state == "ok")


@pytest.mark.parametrize(("files", "quota"), [
    ({"cpu.max": "max 100000"}, None), ({"cpu.max": "150000 100000"}, 1.5), ({}, None), ({"cpu.max": "?"}, None),
    ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
])  # fmt: skip
def test_cgroup_quota(tmp_path, files, quota):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert diagnosis.cgroup_quota(tmp_path) == quota


def test_free_memory_respects_the_container(tmp_path):
    outside = diagnosis.free_memory(tmp_path)
    (tmp_path / "memory.max").write_text("5000")
    (tmp_path / "memory.current").write_text("3000")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500\n")
    assert diagnosis.free_memory(tmp_path) == 2500
    (tmp_path / "memory.max").write_text("max")
    assert outside is None or diagnosis.free_memory(tmp_path) > 2500


def test_wrong_arithmetic_is_a_failure(monkeypatch):
    import torch

    original = torch.Tensor.__matmul__
    spoil = lambda a, b: original(a, b) * (1.0 if a.dtype is torch.float64 else 1.1)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "__matmul__", spoil)
    assert [check.state for check in diagnosis.compute(0.0, 16)][:2] == ["fail", "fail"]


@pytest.mark.parametrize(
    "words", [["--help"], ["ls"], ["gte"], ["ls", "--help"], ["get", "--help"], ["doctor", "--help"]]
)
def test_light_commands_import_nothing_heavy(words):
    script = (
        "import sys; from volvelle.cli.main import main; main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'rich.console', 'huggingface_hub', 'urllib.request'}\n"
        "print(*sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == ""
