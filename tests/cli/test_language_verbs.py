"""The language verbs on a model that is trained here in seconds: from text to a run, and what is done with a run."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from tests.small_runs import SMALL, adapt

from volvelle.adapt import load_run
from volvelle.cli.main import main


def test_train_leaves_a_run_that_answers(in_trained, capsys):
    assert main(["generate", "runs/base", "the cat", "max_tokens=5", "--json"]) == 0
    out = capsys.readouterr()
    answer = json.loads(out.out)
    assert answer["tokens"] <= 5
    assert answer["prompt"] == "the cat"
    assert re.search(r"llama, [\d.]+M parameters", out.err)


def test_generate_is_repeatable_with_a_seed(in_trained, capsys):
    texts = []
    for seed in (1, 1, 2):
        words = ("sampling.temperature=5", f"sampling.seed={seed}", "max_tokens=12", "precision=fp32", "--json")
        main(["generate", "runs/base", "the", *words])
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_prompt_from_a_pipe(in_trained):
    command = [sys.executable, "-m", "volvelle", "generate", "runs/base", "max_tokens=2", "--json"]
    done = subprocess.run(command, input="the dog", capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout)["prompt"] == "the dog"


def test_prompt_longer_than_the_context_is_said(in_trained, capsys):
    assert main(["generate", "runs/base", "cat " * 400]) == 1
    assert re.search(r"error: the prompt has \d+ tokens, the model's context is 64", capsys.readouterr().err)


def test_chat_without_a_template_points_to_generate(in_trained, capsys):
    assert main(["chat", "runs/base", "hello"]) == 2
    assert "tip: volvelle generate runs/base" in capsys.readouterr().err


def test_adapt_eval_export(in_trained, capsys):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    assert adapt("run=adapted") == 0
    said = capsys.readouterr().out
    assert "LoRA; trains" in said
    assert "next     volvelle eval runs/adapted" in said
    assert (in_trained / "runs/adapted/report.html").is_file()
    assert main(["eval", "runs/adapted", "data=rows.jsonl", "outputs=3", "max_tokens=4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["outputs"]) == 3
    assert found["perplexity"] > 1
    assert main(["export", "runs/adapted", "to=hf"]) == 0
    transformers.AutoModelForCausalLM.from_pretrained(in_trained / "runs/adapted/export-hf")
    assert main(["export", "runs/adapted", "to=peft", "out=mine"]) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(in_trained / "runs/base/weights")
    peft.PeftModel.from_pretrained(base, in_trained / "mine")
    assert main(["export", "runs/adapted", "to=peft", "out=mine"]) == 1
    assert "mine: already there" in capsys.readouterr().err


def hints(capsys):
    """The words of each export command in what was printed last."""
    return re.findall(r"volvelle export (\S+) (to=\S+)", capsys.readouterr().out)


def test_an_export_hint_names_what_can_be_written(in_trained, capsys):
    """PEFT has no bottleneck adapters; whole weights are no adapter."""
    assert adapt("method=adapter", "run=bottleneck") == 0
    assert set(hints(capsys)) == {("runs/bottleneck", "to=adapter")}
    assert adapt("method=full", "run=full") == 0
    assert set(hints(capsys)) == {("runs/full", "to=hf")}
    assert main(["export", "runs/bottleneck", "to=peft", "out=nothing"]) == 1
    said = capsys.readouterr().err
    assert "PEFT has no Houlsby adapters" in said
    assert "to=adapter" in said
    assert not (in_trained / "nothing").exists()
    assert main(["export", "runs/bottleneck", "to=adapter"]) == 0
    assert 'volvelle.adapt.load(base_model, "runs/bottleneck/export-adapter")' in capsys.readouterr().out
    for before, after in zip(
        *(load_run(f"runs/{path}").parameters() for path in ("bottleneck", "bottleneck/export-adapter")), strict=True
    ):
        assert torch.equal(before, after)
    assert main(["export", "runs/full", "to=adapter", "out=nothing"]) == 1
    assert "runs/full: holds no adapter" in capsys.readouterr().err


def test_export_hints_of_runs_from_scratch(in_trained, capsys):
    for position, expected in (("rope", {("runs/rope", "to=hf")}), ("alibi", set())):
        words = ("data=text.txt", "steps=1", f"position={position}", f"run={position}", *SMALL)
        assert main(["train", "language", *words]) == 0
        assert set(hints(capsys)) == expected
    assert main(["export", "runs/rope", "to=hf"]) == 0


def test_eval_uses_the_templates_of_the_run(in_trained, capsys):
    adapt("run=templated")
    capsys.readouterr()
    main(["eval", "runs/templated", "data=rows.jsonl", "outputs=0"])
    assert "templates from runs/templated/config.yaml" in capsys.readouterr().out


def test_config_of_a_run_is_accepted_back(in_trained, capsys):
    adapt("run=first", "lora.rank=3")
    assert main(["adapt", "config=runs/first", "run=second"]) == 0
    assert (
        "r: 3" in (in_trained / "runs/second/config.yaml").read_text()
        or "rank: 3" in (in_trained / "runs/second/config.yaml").read_text()
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("method=lroa",), "did you mean lora or dora?"),
        (("lora.targets=q_porj",), "q_proj"),
        (("data=broken.jsonl",), "broken.jsonl:2"),
        (("data=nothing.jsonl",), "nothing.jsonl: no such file"),
        (("prompt={{ qestion }}",), "ask"),
    ],
)
def test_bad_input_is_named_and_leaves_no_run(in_trained, capsys, words, message):
    (in_trained / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    before = set((in_trained / "runs").iterdir())
    assert adapt(*words) in {1, 2}
    assert message in capsys.readouterr().err
    assert set((in_trained / "runs").iterdir()) == before


def test_control_c_saves_and_resume_finishes(in_trained):
    words = ["steps=4000", "checkpoint_every=none", "run=stopped", *SMALL]
    command = [sys.executable, "-m", "volvelle", "train", "language", "data=text.txt", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics, deadline = in_trained / "runs/stopped/metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count('"train"') > 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "continue with: volvelle resume runs/stopped" in out
    manifest = json.loads((in_trained / "runs/stopped/manifest.json").read_text())
    assert manifest["status"] == "interrupted"
    resumed = subprocess.Popen(
        [sys.executable, "-m", "volvelle", "resume", "runs/stopped"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while time.monotonic() < deadline and '"resume"' not in metrics.read_text():
        time.sleep(0.05)
    resumed.send_signal(signal.SIGTERM)
    out, err = resumed.communicate(timeout=120)
    assert f"resumed from the checkpoint of step {manifest['step']}" in out, err


@pytest.mark.slow
def test_quick_tour(tmp_path, monkeypatch, capsys):
    """The whole tour with the real model; needs it fetched, or a network."""
    monkeypatch.chdir(tmp_path)
    assert main(["tour", "quick=true", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["missing"] == {}
    assert record["adapt"]["fp32"]["merged"] == pytest.approx(record["adapt"]["fp32"]["beside"], rel=1e-5)
    assert all(one["same"] for one in record["draft"].values())
    assert max(one["tokens_a_step"] for one in record["draft"].values()) > 1
    assert {"map_50", "run"} <= record["detect"].keys()
    assert set(record["claims"].values()) == {"held"}
    page = (tmp_path / "runs/tour/report.html").read_text()
    assert "<script" not in page
    assert page.count("<img") + page.count("<svg") >= 8
    assert "held-out loss" in page


def test_a_run_from_scratch_is_called_after_its_kind(in_trained, capsys):
    assert main(["train", "language", "data=text.txt", "steps=1", *SMALL]) == 0
    manifest = json.loads((in_trained / "runs/language-1/manifest.json").read_text())
    assert manifest["base_model"] is None
