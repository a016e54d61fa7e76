"""Prefixes and prompts from the command line: trained, saved, opened by every verb, refused where they cannot go."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from tests.small_runs import adapt

from volvelle.adapt import load_run
from volvelle.adapt.prefix import Prefaces
from volvelle.cli.main import main
from volvelle.decode import generate

METHODS = {"prefix": ("prefix.length=5", "prefix.hidden=16"), "prompt": ("prompt_tuning.length=5",)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("more", [(), ("checkpointing=true", "pack=true", "precision=bf16")], ids=["", "all at once"])
def test_from_training_to_an_answer(in_trained, capsys, method, more):
    run = f"{method}{len(more)}"
    assert adapt(f"method={method}", f"run={run}", *METHODS[method], *more) == 0
    said = capsys.readouterr().out
    stored = 5 * 2 * 2 * 32 if method == "prefix" else 5 * 32
    assert re.search(rf"saved runs/{run}/adapter \({stored} numbers, [\d.]+ % of the model\)", said)
    assert f"{method} tuning; trains" in said
    table = load_file(in_trained / f"runs/{run}/adapter/adapter_model.safetensors")["prompt_embeddings"]
    assert table.numel() == stored
    model = load_run(f"runs/{run}", merged=True, dtype=torch.float32)
    assert isinstance(model.before, Prefaces)
    assert torch.equal(model.before.at["default"].flat(), table)
    assert main(["generate", f"runs/{run}", "number 3:", "max_tokens=6", "precision=fp32", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    expected = generate(model, model.tokenizer.encode_prompt("number 3:"), max_tokens=6)
    assert answer["text"] == expected.text
    assert main(["eval", f"runs/{run}", "data=rows.jsonl", "outputs=2", "max_tokens=4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1


def test_words_to_begin_from(in_trained, capsys):
    assert adapt("method=prefix", "prefix.length=4", "prefix.text=the cat sat", "run=words") == 0
    assert "prefix tuning; trains" in capsys.readouterr().out


def test_the_text_has_the_room_that_is_left(in_trained, capsys):
    assert adapt("method=prompt", "prompt_tuning.length=40", "length=40", "run=long") == 2
    assert "length=40: runs/base has a context of 24 tokens" in capsys.readouterr().err


def test_a_prefix_is_exported_alone(in_trained, capsys):
    assert adapt("method=prefix", "run=first", *METHODS["prefix"]) == 0
    capsys.readouterr()
    assert main(["export", "runs/first", "to=hf", "out=whole"]) == 1
    assert "to=peft writes it alone" in capsys.readouterr().err
    assert main(["export", "runs/first", "to=peft", "out=mine"]) == 0
    assert (in_trained / "mine/adapter_config.json").is_file()


def test_before_is_the_model_without_the_prefix(in_trained):
    for method in ("lora", *METHODS):
        assert adapt(f"method={method}", f"run=before-{method}", "batch=4") == 0
    said = [
        json.loads((in_trained / f"runs/before-{method}/manifest.json").read_text()) for method in ("lora", *METHODS)
    ]
    assert said[0]["before"] == said[1]["before"] == said[2]["before"]
    assert said[1]["after"]["loss"] != said[0]["after"]["loss"]
