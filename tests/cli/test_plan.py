"""`volvelle plan` through the command line: the plan, its record, its picture, and what is refused without torch."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from volvelle.cli.main import main
from volvelle.inspect import measure_memory
from volvelle.systems.language.config import MLP, GatedMLP, LanguageConfig, RMSNorm, Rope
from volvelle.systems.language.encoder_decoder import EncoderDecoder
from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig, Stack
from volvelle.systems.language.huggingface_config import config_to_dict
from volvelle.train.language import completion_loss

CONFIG = LanguageConfig(
    "llama", vocabulary=500, width=64, depth=3, heads=4, context=256, norm=RMSNorm(), mlp=GatedMLP(96), position=Rope()
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config_to_dict(CONFIG)))
    return tmp_path


def planned(capsys, *words):
    assert main(["plan", "model", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_from_a_configuration_alone(capsys):
    record = planned(capsys, "precision=fp32", "batch=2", "length=32")
    tied = 500 * 64 + 3 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64
    assert record["parameters"] == record["trained"] == tied
    assert record["composition"]["weights"] == 4 * tied
    assert sum(record["composition"].values()) == record["peak"]
    assert (record["length"], record["batch"], record["device"]) == (32, 2, "cpu")
    assert [row["change"] for row in record["cheaper"]] == ["checkpointing"]
    assert any("20 B x" in line for line in record["explained"])


def test_cards_give_a_verdict_and_the_largest_batch(capsys):
    record = planned(capsys, "gpus=2x0.05", "shard=fsdp", "method=lora", "lora.rank=4")
    assert record["trained"] == 3 * 2 * 4 * (64 + 64)
    assert record["cards"]["fits"] is True
    batch = record["largest_batch"]
    assert batch > 1
    for size, fits in ((batch, True), (batch + 1, False)):
        words = ["gpus=2x0.05", "shard=fsdp", "method=lora", "lora.rank=4", f"batch={size}", "advise=false"]
        assert planned(capsys, *words)["cards"]["fits"] is fits
    assert record["explained"] == []


WIDTH, DEPTH = 64, 3
TRAINED = {
    ("prefix", "prefix.length=5", "prefix.hidden=none"): 2 * DEPTH * WIDTH * 5,
    ("prefix", "prefix.length=5", "prefix.hidden=8", "prefix.text=three words here"): 5 * WIDTH
    + (WIDTH + 1) * 8
    + 9 * 2 * DEPTH * WIDTH,
    ("prompt", "prompt_tuning.length=7"): 7 * WIDTH,
    ("adapter", "adapter.form=pfeiffer", "adapter.width=4"): DEPTH * (2 * WIDTH * 4 + WIDTH + 4),
    ("dora", "dora.rank=2", "dora.targets=o_proj"): DEPTH * (2 * 2 * WIDTH + WIDTH),
}


@pytest.mark.parametrize("words", TRAINED, ids=lambda words: " ".join(words))
def test_every_method_is_planned_with_its_options(capsys, words):
    method, *options = words
    record = planned(capsys, f"method={method}", *options, "length=16", "advise=false")
    assert record["trained"] == TRAINED[words]


def test_an_encoder_decoder_is_planned(capsys, folder):
    side = Stack(2, 4, MLP(96, "gelu"))
    config = EncoderDecoderConfig("bart", vocabulary=500, width=64, encoder=side, decoder=side, context=64, start=2)
    (folder / "model" / "config.json").write_text(json.dumps(config_to_dict(config)))
    record = planned(capsys, "precision=fp32", "batch=3", "advise=false")
    total = sum(p.numel() for p in EncoderDecoder(config).parameters())
    assert record["parameters"] == total
    assert record["composition"]["weights"] == 4 * total
    ids = torch.zeros(3, 64, dtype=torch.long)
    given = {"ids": ids, "targets": ids, "source": ids}
    real = measure_memory(lambda: EncoderDecoder(config), given, loss=lambda m, b: completion_loss(m, b).value)
    assert record["peak"] == pytest.approx(real.peak, rel=0.01)
    record = planned(capsys, "method=prefix", "prefix.length=5", "prefix.hidden=none", "advise=false", "length=16")
    assert (
        record["trained"] == 3 * 2 * 2 * 64 * 5
    )  # before the answer, the source as it is read, and as it is looked at


def test_the_text_and_the_picture(capsys, folder):
    assert main(["plan", "model", "gpus=1x0.001", "svg=timeline.svg"]) == 0
    printed = capsys.readouterr().out
    for words in ("nothing is allocated", "weights", "temporaries", "does not fit", "not even one sample", "cheaper"):
        assert words in printed
    assert ElementTree.parse(folder / "timeline.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["qwen1.5-7"], "did you mean qwen1.5-7b"),
        (["model", "method=lroa"], "did you mean lora"),
        (["model", "prefix.lenght=5"], "did you mean prefix.length"),
        (["model", "gpus=two"], "gpus=2x80"),
        (["model", "length=257"], "has a context of 256 tokens"),
        (["model", "batch=0"], "batch must be at least 1"),
        (["model", "precison=bf16"], "did you mean precision"),
    ],
)
def test_mistakes_are_answered_without_torch(words, message):
    code = (
        f"import sys; from volvelle.cli.main import main; code = main({['plan', *words]!r}); "
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
