"""`volvelle inspect WHAT rf` and `flops`, through the command line."""

import json
from xml.etree import ElementTree

import pytest
from PIL import Image

from volvelle.cli.inspected import find_module, parse_shape
from volvelle.cli.main import main
from volvelle.errors import UsageError

NETS = """
from torch import nn
def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1))
ready = nn.Linear(4, 2)
number = int
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOLVELLE_HOME", str(tmp_path / "home"))
    (tmp_path / "nets_of_mine.py").write_text(NETS)
    return tmp_path


def run(capsys, line, code=0):
    assert main(line.split()) == code
    return capsys.readouterr()


def test_rf_prints_a_table_and_writes_an_overlay(capsys, folder):
    Image.new("L", (60, 40), 128).save(folder / "photo.png")
    options = "shape=1x3x32x48 input=photo.png verify=true effective=true seeds=1 at=2"
    record = json.loads(run(capsys, f"inspect nets_of_mine:small rf {options} --json").out)
    assert record["nodes"][-1]["axes"][0]["size"] == "whole"
    assert record["agrees"] is True
    assert [span[1] - span[0] + 1 for span in record["effective"]["box"]] == [7, 7]
    text = (folder / "nets_of_mine.small-rf.svg").read_text()
    assert "data:image/jpeg;base64," in text
    for name in ("nets_of_mine.small-rf.svg", "nets_of_mine.small-rf-effective.svg"):
        assert ElementTree.parse(folder / name).getroot().tag.endswith("svg")
    out = run(capsys, "inspect rf nets_of_mine:small shape=1x3x32x48 svg=other.svg").out
    assert "wrote other.svg" in out
    assert any(line.split()[:5] == ["2", "conv2d", "1x4x14x22", "7", "2"] for line in out.splitlines())


def test_flops_of_a_module_and_of_a_language_model(capsys):
    record = json.loads(run(capsys, "inspect nets_of_mine:small flops shape=1x3x32x48 --json").out)
    assert record["macs"] == 4 * 16 * 24 * 27 + 4 * 14 * 22 * 36
    out = run(capsys, "inspect flops gpt2 length=3 layers=false").out
    assert "G MACs" in out
    assert "124.4M parameters" in out


@pytest.mark.slow
def test_backbones_by_name(capsys):
    found = find_module("efficientnet_lite0", None)
    assert found.shape == (1, 3, 224, 224)
    out = run(capsys, "inspect shufflenet-v2-x0.5 rf shape=1x3x64x64").out
    assert any(line.split()[:2] == ["maxpool", "max_pool2d"] for line in out.splitlines())


@pytest.mark.parametrize(
    ("line", "message", "tip"),
    [
        ("inspect efficientnet-b9 rf", "'efficientnet-b9' names no model here", "did you mean efficientnet-b"),
        ("inspect nets_of_mine:none rf", "nets_of_mine:none: module 'nets_of_mine' has no attribute", "importable"),
        ("inspect nets_of_mine:number flops", "gives int, a torch.nn.Module is wanted", None),
        ("inspect nets_of_mine:small rf shape=3x-1", "shape=3x-1: positive numbers joined by x", "shape=1x3x224x224"),
        ("inspect nets_of_mine:small rf input=no.png", "no.png", None),
        ("inspect gpt2 rf", "gpt2 reads token ids", None),
        ("inspect gpt2 flops length=0", "length must be at least 1, got 0", None),
        ("inspect bart-base flops", "bart-base: an encoder-decoder takes two inputs", None),
        ("inspect rff", "unknown verb 'inspect rff'", "did you mean rf?"),
    ],
)
def test_mistakes_are_named(capsys, line, message, tip):
    assert main(line.split()) in {1, 2}
    error = capsys.readouterr().err
    assert message in error
    assert tip is None or tip in error.partition("tip: ")[2]
    assert "Traceback" not in error


def test_shapes_are_read():
    assert parse_shape("1X3x20,30") == (1, 3, 20, 30)
    with pytest.raises(UsageError):
        parse_shape("1x0")
