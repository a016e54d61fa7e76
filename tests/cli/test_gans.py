"""`eval` and `generate` on a run of `train gan`."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from volvelle.cli.main import main
from volvelle.data.images import to_image
from volvelle.runs import RunFolder
from volvelle.systems.generation.gan import GAN, write_gan
from volvelle.systems.generation.gan_config import DCGAN, GANConfig


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run of an untrained generator, and a folder of ten pictures beside it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = RunFolder.create("gan", kind="gan", config={"extractor": "pixels"})
    write_gan(GAN(GANConfig(12, 3, 4, DCGAN(4), DCGAN(4))), found.path / "weights")
    (tmp_path / "pictures").mkdir()
    for number in range(10):
        to_image(torch.randint(0, 256, (3, 15, 12 + number), dtype=torch.uint8)).save(f"pictures/{number}.png")
    return found.path


def test_eval_measures_beside_a_folder_by_features_it_names(run, capsys):
    assert main(["eval", str(run), "data=pictures", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["FD-pixels-8"] > 0
    assert 0 <= found["precision"] <= 1
    assert main(["eval", str(run), "data=pictures", "extractor=resnet-18"]) != 0
    assert "no weights are known" in capsys.readouterr().err


def test_generate_writes_a_sheet_and_the_same_one_for_a_seed(run, capsys):
    for name in ("one", "two"):
        assert main(["generate", str(run), "count=5", "sampling.seed=3", f"out={name}.png"]) == 0
    one, two = (Image.open(f"{name}.png") for name in ("one", "two"))
    assert one.tobytes() == two.tobytes()
    assert min(one.size) > 2 * 12
    assert main(["generate", str(run), "class=cat"]) != 0
    assert "a generator draws whatever it draws" in capsys.readouterr().err
