"""`predict` with a promptable model as it is typed: points, boxes, everything; pictures of odd kinds; what is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.systems.segmentation.sam import small

from volvelle.cli.main import main
from volvelle.cli.pointing import read_prompts
from volvelle.data.coco_masks import read_coco_masks
from volvelle.errors import UsageError
from volvelle.systems.segmentation.sam import EverythingOptions, Promptable, holds_sam, load_sam, sam, write_sam
from volvelle.systems.segmentation.sam.crops import crops


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


def checkpoints(folder):
    """The same kind of model as each format that there is."""
    net = small.model()
    write_sam(net, folder / "meta.pth", "meta")
    write_sam(net, folder / "theirs", "hf")
    torch.save({"model": net.state_dict()}, folder / "wrapped.pth")
    torch.save(net.state_dict(), folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(net.state_dict(), folder / "meta.safetensors")
    return ["net", "meta.pth", "theirs", "theirs/model.safetensors", "wrapped.pth", "old.pth", "meta.safetensors"]


def test_every_checkpoint_is_known_for_what_it_is(here, capsys):
    for model in checkpoints(here):
        assert holds_sam(model)
        code, out = run(capsys, model, "a.png")
        assert code == 2
        assert "a promptable model wants to be asked" in out.err
        assert f"volvelle predict {model} a.png points=120,80" in out.err
        assert run(capsys, model, "a.png", "points=20,10")[0] == 0
    save_file({"conv_stem.weight": torch.zeros(1)}, here / "other.safetensors")
    (here / "empty.pth").touch()
    assert not any(map(holds_sam, ("other.safetensors", "empty.pth", "nowhere.pth", "a.png", ".")))


def test_numbers_and_segmentations_that_were_asked_for(here, capsys):
    words = ("net", "a.png", "boxes=1,2,60,40")
    assert run(capsys, *words, "out=rle")[0] == 0
    assert run(capsys, *words, "out=polygons", "segmentation=polygons")[0] == 0
    kinds = {}
    for name in ("rle", "polygons"):
        file = here / name / "a-masks.json"
        kinds[name] = type(json.loads(file.read_text())["annotations"][0]["segmentation"])
    assert kinds == {"rle": dict, "polygons": list}
    found = [read_coco_masks(here / name / "a-masks.json")[0][2][0].mask for name in kinds]
    assert found[0] == found[1]
    code, out = run(capsys, *words, "precision=bf16", "--json")
    assert code == 0
    half = json.loads(out.out)["images"][0]["objects"][0]["predicted_iou"]
    whole = json.loads(run(capsys, *words, "--json")[1].out)["images"][0]["objects"][0]["predicted_iou"]
    assert half != whole
    assert half == pytest.approx(whole, abs=0.05)


def test_points_are_counted_for_the_picture_at_hand(here, capsys):
    Image.new("RGB", (40, 1)).save("flat.png")
    words = ("everything=true", "grid.points=2", "grid.crop_layers=1")
    code, out = run(capsys, "net", "flat.png", *words)
    assert code == 0
    count = sum(crop.points**2 for crop in crops((1, 40), EverythingOptions(points=2, crop_layers=1)))
    assert f"{count} points in" in out.out


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
        (["net", "a.png", "b.jpg", "points=60,30"], "b.jpg: predict: point 0 of prompt 0 at (60, 30) is outside"),
        (["net", "a.png", "b.jpg", "boxes=1,1,60,30"], "b.jpg: predict: box 0 (1, 1, 60, 30) leaves"),
        (["net", "a.png", "points=nan,3"], "points: numbers are wanted, got 'nan,3'"),
        (["net", "a.png", "points=3,inf"], "points: numbers are wanted"),
        (["net", "a.png", "points=1,2", "labels=nan"], "labels: numbers are wanted"),
        (["net", "a.png", "points=1,2", "labels=0.5"], "labels: 1 or 0 is wanted for each point, got 0.5"),
        (["net", "a.png", "points=1,2", "grid.points=3"], "grid: only of use with everything=true"),
        (["net", "a.png", "points=1,2", "memory=3", "grid.points=3"], "grid and memory: only of use"),
        (["net", "a.png", "points=1,2", "device=toaster"], "device=toaster: no such kind of device"),
        (["efficientnet-lite0", "a.png", "precision=bf16"], "precision: for promptable models"),
        (["net", "a.png"], "a promptable model wants to be asked"),
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
