"""`volvelle adapt extract`: a table, a run that later verbs open, and models that do not fit."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from volvelle.adapt import load_run
from volvelle.cli.main import main
from volvelle.cli.verbs.adapt_extract import summary
from volvelle.runs import RunFolder
from volvelle.systems.language.config import GatedMLP, LanguageConfig, RMSNorm, Rope
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.huggingface import write_folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folders `base` and `tuned`: two layers got a difference of rank 1, and a norm was changed."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = LanguageConfig(
        "llama", vocabulary=50, width=16, depth=2, heads=2, context=32, norm=RMSNorm(), mlp=GatedMLP(24),
        position=Rope(),
    )  # fmt: skip
    base = Decoder(config)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for layer in tuned.model.layers:
            layer.mlp.down_proj.weight.add_(torch.outer(torch.linspace(-1, 1, 16), torch.ones(24)))
        tuned.model.norm.weight.mul_(1.25)
    write_folder(base, tmp_path / "base")
    write_folder(tuned, tmp_path / "tuned")
    return tmp_path


def test_a_fine_tune_becomes_a_run(here, capsys):
    assert main(["adapt", "extract", "base", "tuned", "run=mine"]) == 0
    said = capsys.readouterr().out
    assert "down_proj 2 16 x 24 1 100.00%" in " ".join(said.split())
    assert "model.norm.weight" in said
    assert "25.00%" in said
    page = (here / "runs/mine/report.html").read_text()
    assert "model.layers.1.mlp.down_proj" in page
    assert RunFolder.open("runs/mine").status == "finished"
    ids = torch.arange(6)[None]
    ours, tuned = load_run("runs/mine"), load_run("tuned")
    with torch.no_grad():
        tuned.model.norm.weight.div_(1.25)
        torch.testing.assert_close(ours(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-5)


def test_machines_get_every_layer(here, capsys):
    assert main(["adapt", "extract", "base", "tuned", "rank=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["layers"]) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert found["stored"] == 2 * (16 + 24)
    assert found["left_out"] == {"model.norm.weight": pytest.approx(0.25)}
    assert "lm_head" in found["unchanged"]


def test_models_that_do_not_fit_leave_no_run(here, capsys):
    wide = Decoder(LanguageConfig(
        "llama", vocabulary=50, width=24, depth=2, heads=2, context=32, norm=RMSNorm(), mlp=GatedMLP(24),
        position=Rope(),
    ))  # fmt: skip
    write_folder(wide, here / "wide")
    assert main(["adapt", "extract", "base", "wide"]) == 1
    assert "error: extract_lora: the two models do not fit: model.embed_tokens.weight" in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_layers_of_one_name_are_one_row():
    from volvelle.adapt.extract import Kept

    layers = {
        "0.q": Kept(2, 0.991, 0.01, (4, 4)),
        "1.q": Kept(5, 0.999, 0.03, (4, 4)),
        "1.k": Kept(1, 1.0, 0.5, (2, 4)),
    }
    rows = summary(layers)
    assert rows[0] == ["q", 2, "4 x 4", "2 to 5", "99.10% to 99.90%", "1.00% to 3.00%"]
    assert rows[1] == ["k", 1, "2 x 4", "1", "100.00%", "50.00%"]
