"""`predict` with a promptable model as it is typed: points, boxes, everything; pictures of odd kinds; what is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from volvelle.cli.main import main
from volvelle.cli.pointing import read_prompts
from volvelle.data.coco_masks import read_coco_masks
from volvelle.errors import UsageError
from volvelle.systems.segmentation.sam import Promptable, load_sam, sam, write_sam


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A model of few pixels in the folder net, and two pictures."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    write_sam(sam("lite0", size=64), tmp_path / "net")
    draw = np.random.default_rng(0)
    for name, size in (("a.png", (48, 80)), ("b.jpg", (40, 40))):
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(name)
    return tmp_path


def run(capsys, *words):
    code = main(["predict", *words])
    return code, capsys.readouterr()


def test_points_and_boxes(here, capsys):
    code, out = run(capsys, "net", "a.png", "b.jpg", "points=20,10,30,12;5,6", "labels=1,0;1", "--json")
    assert code == 0
    first, second = json.loads(out.out)["images"]
    assert first["overlay"] == "predictions/a-overlay.png"
    assert [one["point_labels"] for one in first["objects"]] == [[1, 0], [1]]
    assert Image.open(first["overlay"]).size == (80, 48)
    ((image, size, objects),) = read_coco_masks(here / second["masks"])
    assert (image.resolve(), size) == ((here / "b.jpg").resolve(), (40, 40))
    promptable = Promptable(load_sam("net"))
    wanted = promptable.predict(
        promptable.embed(Image.open("b.jpg")), points=[[[20, 10], [30, 12]], [[5, 6]]], labels=[[1, 0], [1]]
    )
    best = wanted.iou.argmax(1)
    for one, masks, rank in zip(objects, wanted.masks, best, strict=True):
        assert (one.mask.mask() != masks[rank].numpy()).sum() <= 1
    code, out = run(capsys, "net", "a.png", "boxes=1,2,30,40,5,5,70,40", "out=boxed")
    assert code == 0
    assert "a.png: 2 masks" in out.out
    notes = json.loads((here / "boxed" / "a-masks.json").read_text())["annotations"]
    assert [note["asked_box"] for note in notes] == [[1, 2, 29, 38], [5, 5, 65, 35]]


def test_everything(here, capsys):
    words = ("grid.points=3", "grid.iou=0", "grid.stability=0", "grid.nms=1")
    code, out = run(capsys, "net", "a.png", "everything=true", *words, "memory=0.5", "--json")
    assert code == 0
    (found,) = json.loads(out.out)["images"]
    assert len(found["objects"]) == 27
    assert {"predicted_iou", "stability_score", "point_coords", "crop_box", "area", "box"} <= set(found["objects"][0])
    code, out = run(capsys, "net", "a.png", "everything=true", "grid.points=2", "grid.iou=1")
    assert code == 0
    assert "a.png: 0 masks" in out.out
    assert "lower grid.iou" in out.out
    assert read_coco_masks(here / "predictions" / "a-masks.json")[0][2] == []


def test_pictures_of_odd_kinds(here, capsys):
    grey = Image.open("a.png").convert("L")
    grey.save("grey.png")
    Image.open("a.png").convert("CMYK").save("cmyk.jpg")
    Image.open("a.png").convert("RGBA").save("alpha.png")
    turned, exif = Image.open("a.png"), Image.Exif()
    exif[0x0112] = 6
    turned.save("turned.jpg", exif=exif)
    code, out = run(capsys, "net", "grey.png", "cmyk.jpg", "alpha.png", "turned.jpg", "points=40,20", "--json")
    assert code == 0
    sizes = [Image.open(one["overlay"]).size for one in json.loads(out.out)["images"]]
    assert sizes == [(80, 48), (80, 48), (80, 48), (48, 80)]


@pytest.mark.slow
def test_an_enormous_picture(here, capsys):
    Image.new("L", (20_000, 20_000), 90).save("large.jpg", quality=30)
    code, out = run(capsys, "net", "large.jpg", "points=19000,500", "--json")
    assert code == 0
    (found,) = json.loads(out.out)["images"]
    assert json.loads((here / found["masks"]).read_text())["images"][0]["width"] == 20_000
    assert max(Image.open(found["overlay"]).size) <= 4100


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["net", "a.png", "points=200,10"], "outside the picture of 80 x 48"),
        (["net", "a.png", "boxes=5,5,5,9"], "is empty"),
        (["net", "a.png", "points=1,2,3"], "x,y in turn are wanted, got 3 numbers"),
        (["net", "a.png", "points=1,x"], "numbers are wanted"),
        (["net", "a.png", "points=1,2", "labels=1,0"], "one for each point"),
        (["net", "a.png", "points=1,2", "boxes=1,2,3,4,5,6,7,8"], "2 boxes and points of 1 objects"),
        (["net", "a.png", "points=1,2", "everything=true"], "asks by itself"),
        (["net", "nowhere.png", "points=1,2"], "nowhere.png: no such file"),
        (["net", "a.png", "everything=true", "grid.points=0"], "points: must be 1"),
        (["net", "a.png", "everything=true", "memory=0.0001"], "one point needs"),
        (["net", "a.png", "everything=true", "memory=-1"], "above 0 GB"),
        (["net", "a.png", "grid.pionts=3"], "grid.points"),
        (["efficientnet-lite9", "a.png", "points=1,2"], "efficientnet-lite9"),
    ],
)
def test_what_is_wrong_is_said(here, capsys, words, told):
    code, out = run(capsys, *words)
    assert code in (1, 2)
    assert told in out.err
    assert not (here / "predictions" / "a-overlay.png").exists()


def test_typed_prompts():
    assert read_prompts("", "", "") == read_prompts(" ", "", ";")
    assert read_prompts("1,2;3,4", "", "").labels == [[1], [1]]
    with pytest.raises(UsageError, match="1 and 1 points, no labels"):
        read_prompts("1,2;3,4", ";", "")
