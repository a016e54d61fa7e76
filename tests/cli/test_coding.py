"""What predict and export do with image codecs."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from volvelle.cli.verbs import export, predict
from volvelle.errors import UsageError
from volvelle.runs import RunFolder
from volvelle.systems.generation.config import VQGANConfig
from volvelle.systems.generation.load import load_vqgan, vqgan, write_vqgan


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    folder = RunFolder.create("codec", root=tmp_path, kind="vqgan", config={})
    write_vqgan(vqgan(VQGANConfig("vqgan", 1, 8, 32, (1, 2), 1, (), 4, 3, 16)), folder.path / "weights")
    return folder.path


def test_predict_writes_pictures_above_what_their_codes_show(run, tmp_path, capsys):
    Image.new("RGB", (30, 20), "white").save(tmp_path / "a.jpg")
    options = predict.Options(model=str(run), images=(str(tmp_path / "a.jpg"),), out=str(tmp_path / "out"))
    assert predict.main(options) == 0
    with Image.open(tmp_path / "out" / "a-codes.png") as sheet:
        assert sheet.height > sheet.width  # one above the other
    assert "different codes" in capsys.readouterr().out


@pytest.mark.parametrize(("to", "file"), [("taming", "vqgan.ckpt"), ("diffusers", ""), ("transformers", "")])
def test_export_writes_what_the_other_library_reads(run, tmp_path, to, file):
    out = tmp_path / to
    assert export.main(export.Options(run=str(run), to=to, out=out)) == 0
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    assert torch.equal(load_vqgan(out / file).encode(x), load_vqgan(run).encode(x))
    if to == "diffusers":
        assert json.loads((out / "config.json").read_text())["_class_name"] == "VQModel"


def test_formats_for_other_things_are_refused(run, tmp_path):
    with pytest.raises(UsageError, match="holds an image codec, and to=hf is for language models"):
        export.main(export.Options(run=str(run), to="hf", out=tmp_path / "x"))
    with pytest.raises(UsageError, match="to=taming is for image codecs"):
        export.main(export.Options(run=str(tmp_path), to="taming", out=tmp_path / "x"))
