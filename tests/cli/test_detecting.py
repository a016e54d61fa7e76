"""`train detect`, `predict` and `eval` as they are typed: what is listed, what the help says, a run of two steps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from volvelle.cli.main import main
from volvelle.data.boxes import Boxes, BoxFolder, write_coco
from volvelle.systems.detection import detector, write_detector


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Four pictures with a box each, and the folder that runs begin in."""
    monkeypatch.chdir(tmp_path)
    files, boxes, draw = [], [], np.random.default_rng(0)
    (tmp_path / "boxes").mkdir()
    for i in range(4):
        pixels = draw.integers(0, 60, (48, 64, 3)).astype(np.uint8)
        pixels[10:30, 20:44] = 250
        files.append(tmp_path / "boxes" / f"{i}.png")
        Image.fromarray(pixels).save(files[-1])
        corners = torch.tensor([[20.0, 10, 44, 30]])
        boxes.append(Boxes(corners, torch.tensor([0]), torch.tensor([False]), torch.tensor([480.0])))
    write_coco(BoxFolder(tmp_path, files, boxes, [(64, 48)] * 4, ("card",)), tmp_path / "boxes" / "train.json")
    return tmp_path / "boxes"


def test_it_is_listed(capsys):
    assert main([]) == 0
    assert "  train detect       train a detector on pictures with boxes\n" in capsys.readouterr().out
    assert main(["ls", "recipes"]) == 0
    listed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "volvelle train detect train a detector on pictures with boxes" in listed


def test_help_shows_the_recipe(capsys):
    assert main(["train", "detect", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert page.startswith("usage: volvelle train detect [key=value …] Train a detector on pictures with boxes.")
    for words in (
        "(default: thundernet-snet49)", "(default: 320)", "(default: 11)", "(default: 0.6,1.25)", "(default: 8)",
        "(default: 0.0015)", "(default: 0.02)", "(default: 10.0)", "(default: 0.998)", "(default: bf16)",
        "volvelle train detect data=bccd",
    ):  # fmt: skip
        assert words in page, words


def test_typos_and_missing_data(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "detect", "anchor=3"]) == 2
    assert "anchors" in capsys.readouterr().err
    assert main(["train", "detect", "model=thundernet-snet48"]) == 2
    assert "snet49" in capsys.readouterr().err
    assert main(["train", "detect", "data=nowhere"]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*"))


def test_train_predict_and_eval(data, capsys):
    words = ["size=64", "batch=2", "steps=2", "samples=1", "precision=fp32", "anchors=1", "run=cards"]
    assert main(["train", "detect", f"data={data}", *words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {"map", "map_50", "voc_map"} <= set(record["after"])
    photo = str(data / "0.png")
    assert main(["predict", "runs/cards", photo, "out=found", "score=0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["images"][0]
    assert Image.open(found["boxes"]).size == (420, 315)
    assert all(entry["class"] == "card" for entry in found["objects"])
    assert main(["eval", "runs/cards", f"data={data}", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["classes"]["card"]["boxes"] == 4
    assert main(["eval", "runs/cards", f"data={data}", "split=val"]) == 2
    assert "has no val part" in capsys.readouterr().err


def test_export_names_what_it_cannot_write(data, capsys):
    assert main(["export", "smollm2", "to=onnx", "out=a"]) == 2
    assert "to=onnx is for runs of train detect and train promptable, and smollm2 is neither" in capsys.readouterr().err
    write_detector(detector("thundernet-snet49", ("card",)), data / "net")
    assert main(["export", str(data / "net"), "out=a"]) == 2
    assert "tip: to=onnx" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.peer
def test_export_to_onnx(data, capsys):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = detector("thundernet-snet49", ("card",)).eval()
    write_detector(model, data / "net")
    assert main(["export", str(data / "net"), "to=onnx", "--json"]) == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    session = runtime.InferenceSession(file)
    assert session.get_inputs()[0].shape == [1, 3, 320, 320]
