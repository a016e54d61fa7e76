"""`train prior`, `generate`, `eval` and `export` of runs that draw, as they are typed."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from PIL import Image
from tests.small_priors import grey_pictures, small_codec

from volvelle.cli.main import main

SMALL = ("model.width=32", "model.depth=2", "model.heads=2", "batch=8", "samples=2", "average=none")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with pictures of two classes, a random codec and a trained run `draws`."""
    folder = tmp_path_factory.mktemp("drawing")
    with contextlib.chdir(folder):
        grey_pictures(folder / "grey")
        small_codec(folder / "codec")
        assert main(["train", "prior", "data=grey", "codec=codec", "steps=2", "run=draws", *SMALL]) == 0
    return folder


@pytest.fixture
def inside(drawn, monkeypatch):
    monkeypatch.chdir(drawn)
    return drawn


def record(capsys, *words):
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_draws_a_sheet_by_class(inside, capsys):
    found = record(capsys, "generate", "runs/draws", "count=3", "class=dark", "sampling.seed=5", "out=sheet.png")
    assert (found["pictures"], len(found["codes"]), found["out"]) == (3, 3, "sheet.png")
    with Image.open(inside / "sheet.png") as image:
        assert image.mode == "L"
        assert min(image.size) >= 64
    again = record(capsys, "generate", "runs/draws", "count=3", "class=1", "sampling.seed=5")
    assert again["codes"] == found["codes"]
    assert again["out"] == "runs/draws/generated-1.png"
    other = record(capsys, "generate", "runs/draws", "count=3", "class=bright", "sampling.seed=5")
    assert other["out"] == "runs/draws/generated-2.png"
    greedy = record(capsys, "generate", "runs/draws", "count=2", "class=dark", "temperature=0", "out=a.png")
    assert greedy["codes"][0] == greedy["codes"][1]


def test_larger_pictures_and_beginnings(inside, capsys):
    found = record(capsys, "generate", "runs/draws", "count=1", "size=20,24", "out=large.png")
    assert torch.tensor(found["codes"]).shape == (1, 5, 6)
    picture = next((inside / "grey" / "bright").glob("*.png"))
    begun = record(capsys, "generate", "runs/draws", "count=2", f"begin={picture}", "keep=0.7", "out=begun.png")
    codes = torch.tensor(begun["codes"])
    assert torch.equal(codes[0, :2], codes[1, :2])


@pytest.mark.parametrize(
    ("words", "error", "tip"),
    [
        (["class=drak"], "no such class", "dark"),
        (["a dark square"], "trained without captions", "class="),
        (["size=13,12"], "a code is 4 x 4 pixels", "multiples"),
        (["size=24,8"], "this prior's are 3 wide", "wider"),
        (["count=0"], "count must be at least 1", ""),
        (["max_tokens=3"], "max_tokens= is for text", ""),
        (["beams.width=2"], "beams= is for text", ""),
        (["keep=1"], "keep must be at least 0", ""),
        (["begin=nowhere.png"], "no such file", ""),
        (["draft=medusa:runs/draws"], "holds no medusa", ""),
    ],
)
def test_what_it_cannot_draw_is_said(inside, capsys, words, error, tip):
    assert main(["generate", "runs/draws", *words]) in (1, 2)
    said = capsys.readouterr().err
    assert error in said
    assert tip in said
    assert "Traceback" not in said


def test_options_of_pictures_are_not_for_text(capsys):
    assert main(["generate", "smollm2", "once", "count=3"]) == 2
    assert "count= is for runs that draw pictures" in capsys.readouterr().err


def test_eval_measures_codes_and_distances(inside, capsys):
    found = record(capsys, "eval", "runs/draws", "data=grey", "extractor=pixels", "samples=6")
    assert {"loss", "perplexity", "FD-pixels-8", "FD-pixels-8 floor", "FD-pixels-8 codec"} <= set(found)
    assert found["drawn"] == 6
    assert main(["eval", "runs/draws", "data=grey", "judge=codec"]) == 2
    assert "judge=codec: not a run" in capsys.readouterr().err


def test_it_exports_a_llama(inside, capsys):
    found = record(capsys, "export", "runs/draws", "to=hf", "out=llama")
    assert len(found["files"]) == 3
    values = json.loads((inside / "llama" / "generation_config.json").read_text())
    assert values["suppress_tokens"] == list(range(16, 32))
    assert json.loads((inside / "llama" / "config.json").read_text())["model_type"] == "llama"


def test_help_and_typos(capsys):
    assert main(["train", "prior", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    for words in ("data=TEXT", "(default: auto)", "volvelle train prior data=fashion-mnist epochs=3"):
        assert words in page
    assert main(["train", "prior", "codek=x"]) == 2
    assert "codec" in capsys.readouterr().err
