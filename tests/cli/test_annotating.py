"""`annotate`: a session of clicks, what is typed, proposals, and the file that the next training reads."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from volvelle.cli.annotating import PREVIEW, annotate, drawn
from volvelle.data import run_lengths
from volvelle.data.coco_masks import MaskedObject, read_coco_masks
from volvelle.data.promptable import read_objects
from volvelle.data.promptable_clicks import Click
from volvelle.data.run_lengths import RunLengths
from volvelle.errors import UsageError
from volvelle.systems.segmentation.sam.load import sam, write_sam
from volvelle.systems.segmentation.sam.options import EverythingOptions
from volvelle.systems.segmentation.sam.promptable import Promptable
from volvelle.train import promptable_engine
from volvelle.train.promptable_engine import Collection, Session, propose


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    write_sam(sam("lite0", size=64), folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(draw.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


class Discs:
    """Answers a click with a disc around the last one; against clicks make it smaller."""

    def __init__(self):
        self.multimask = []

    def embed(self, image):
        return image

    def predict(self, embedding, *, points=None, labels=None, boxes=None, masks=None, multimask=True):
        self.multimask.append(multimask)
        y, x = np.mgrid[: embedding.height, : embedding.width]
        if points is None:
            x1, y1, x2, y2 = boxes[0].tolist()
            mask = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
        else:
            radius = 4 + 2 * points.shape[1] - 4 * int((labels == 0).sum())
            px, py = points[0, 0].tolist()
            mask = (x - px) ** 2 + (y - py) ** 2 <= radius**2
        count = 3 if multimask else 1
        found = torch.from_numpy(mask).expand(1, count, -1, -1).clone()
        return type(
            "Masks", (), {"masks": found, "iou": torch.full((1, count), 0.9), "logits": torch.zeros(1, count, 16, 16)}
        )


def session(kept=()):
    return Session(Discs(), Image.new("RGB", (64, 48)), kept=list(kept))


def test_a_session_of_clicks():
    one = session()
    first = one.click(20, 20)
    second = one.click(24, 20)
    assert second.mask.sum() > first.mask.sum()
    assert one.click(30, 20, 0).mask.sum() < second.mask.sum()
    assert one.undo() is second
    assert one.prompted.multimask == [True, False, False]
    kept = one.keep("cell")
    assert kept.mask.area == second.mask.sum()
    assert (kept.name, kept.facts["point_coords"], kept.facts["point_labels"]) == ("cell", [[20, 20], [24, 20]], [1, 1])
    assert "asked_box" not in kept.facts
    assert one.answer is None
    assert one.draw((2, 3, 12, 9)).mask.sum() == 60
    assert one.prompted.multimask[-1] is False
    assert one.keep().facts == {"predicted_iou": 0.9, "asked_box": [2, 3, 10, 6]}
    one.drop(2)
    one.draw((2, 3, 12, 9))
    assert one.undo() is None
    assert one.box is None
    assert one.picture().size == (64, 48)
    one.drop(1)
    assert one.kept == []
    for wrong, message in (
        (lambda: one.click(64, 2), "outside the picture"),
        (lambda: one.draw((5, 5, 5, 9)), "x1 < x2"),
        (one.undo, "nothing was clicked"),
        (one.keep, "there is no mask yet"),
        (lambda: one.drop(1), "there are 0"),
    ):
        with pytest.raises(UsageError, match=message):
            wrong()


def test_a_collection_is_added_to(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (8, 6)).save(tmp_path / f"{name}.png")
    mask = RunLengths.of(np.eye(6, 8, dtype=bool))
    collection = Collection(tmp_path / "out" / "objects.json")
    collection.add(tmp_path / "a.png", (8, 6), [MaskedObject(mask, "cell")])
    again = Collection(tmp_path / "out" / "objects.json")
    assert tmp_path / "a.png" in again
    assert tmp_path / "b.png" not in again
    again.add(tmp_path / "b.png", (8, 6), [MaskedObject(mask), MaskedObject(mask, "cell")])
    read = read_coco_masks(tmp_path / "out" / "objects.json")
    assert [(image.name, [one.name for one in objects]) for image, _, objects in read] == [
        ("a.png", ["cell"]), ("b.png", ["object", "cell"]),
    ]  # fmt: skip
    assert read[1][2][0].mask == mask


def test_what_a_file_held_before_stays(tmp_path):
    """Somebody's file in annotations/ beside train/: everything that is not about the picture at hand."""
    (tmp_path / "train").mkdir()
    (tmp_path / "annotations").mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 6)).save(tmp_path / "train" / f"{name}.png")
    file = tmp_path / "annotations" / "instances_train.json"
    facts = {"predicted_iou": 0.5, "point_coords": [[1, 2]], "attributes": {"blurred": True}}
    before = {
        "info": {"year": 2026},
        "licenses": [{"id": 1, "name": "ours"}],
        "images": [
            {"id": 70, "file_name": "a.png", "width": 8, "height": 6, "license": 1},
            {"id": "b", "file_name": "b.png"},
        ],
        "categories": [{"id": 3, "name": "cat", "supercategory": "animal"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {"id": 12, "image_id": 70, "category_id": 9, "bbox": [1, 1, 2, 2]},
            {"id": 40, "image_id": 70, "category_id": 3, "bbox": [0, 0, 3, 3],
             "segmentation": [[0, 0, 3, 0, 3, 3]], **facts},
            {"id": 41, "image_id": "b", "category_id": 3, "bbox": [0, 0, 3, 3]},
        ],
    }  # fmt: skip
    file.write_text(json.dumps(before))
    mask = RunLengths.of(np.eye(6, 8, dtype=bool))
    collection = Collection(file)
    collection.add(tmp_path / "train" / "c.png", (8, 6), [MaskedObject(mask, "dog"), MaskedObject(mask, "cow")])
    collection.add(tmp_path / "train" / "b.png", (8, 6), [MaskedObject(mask, "cat")])
    after = json.loads(file.read_text())
    assert {name: after[name] for name in ("info", "licenses")} == {name: before[name] for name in ("info", "licenses")}
    assert after["categories"] == [*before["categories"], {"id": 10, "name": "cow"}]
    assert after["annotations"][:2] == before["annotations"][:2]
    assert [(one["id"], one["image_id"], one["category_id"]) for one in after["annotations"][2:]] == [
        (42, 71, 9), (43, 71, 10), (44, "b", 3),
    ]  # fmt: skip
    assert after["images"][0] == before["images"][0]
    assert [one["file_name"] for one in after["images"]] == ["a.png", "b.png", "c.png"]
    assert [place.name for place, _, _ in read_coco_masks(file)] == ["a.png", "b.png", "c.png"]
    assert len(Collection(file)) == 5


def test_a_collection_compresses_no_mask_twice(tmp_path, monkeypatch):
    calls = []
    compress = run_lengths.compress
    monkeypatch.setattr(run_lengths, "compress", lambda counts: calls.append(1) or compress(counts))
    mask = RunLengths.of(np.eye(6, 8, dtype=bool))
    for number in range(4):
        Image.new("RGB", (8, 6)).save(tmp_path / f"{number}.png")
        Collection(tmp_path / "objects.json").add(tmp_path / f"{number}.png", (8, 6), [MaskedObject(mask)])
    assert len(calls) == 4


def test_typed_words_become_objects_that_training_reads(model, photos, monkeypatch, capsys):
    monkeypatch.setattr("volvelle.systems.segmentation.sam.promptable.Promptable", lambda model: Discs())
    typed = "20,20 / + 24 20 / - 40,20 / undo / keep cell / nonsense / list / box 2,3,12,9 / keep / next / 5,5 / stop"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed.replace(" / ", "\n")))
    grid = EverythingOptions(points=2)
    assert annotate(str(model), photos, step="assisted", out=None, name="thing", grid=grid) == 0
    said = capsys.readouterr().out
    for words in (
        "kept 1: cell",
        "'nonsense': not understood",
        "kept 2: thing, 60 pixels",
        "stopped",
        "next     volvelle",
    ):
        assert words in said
    assert Image.open(photos / PREVIEW).size == (64, 48)
    folder = read_objects(photos / "objects.json")[""]
    assert [file.name for file in folder.files] == ["a.png"]
    assert [folder.classes[label] for label in folder[0][1].labels] == ["cell", "thing"]
    # The same command goes on with what is left, and the preview is no picture.
    monkeypatch.setattr("sys.stdin", io.StringIO("skip\n"))
    annotate(str(model), photos, step="assisted", out=None, name="thing", grid=grid)
    assert "1 of 2 pictures to do; 2 objects" in capsys.readouterr().out


def test_proposals_are_kept_or_dropped(model, photos, monkeypatch, capsys):
    square = np.zeros((48, 64), dtype=bool)
    square[4:20, 4:20] = True
    found = [
        MaskedObject(RunLengths.of(square), facts={"predicted_iou": 0.9, "stability_score": 0.97}) for _ in range(2)
    ]
    monkeypatch.setattr(promptable_engine, "propose", lambda prompted, image, options: list(found))
    monkeypatch.setattr("sys.stdin", io.StringIO("drop 2\n40,30\nkeep\nnext\nnext\n"))
    grid, out = EverythingOptions(points=2), photos / "semi.json"
    annotate(str(model), photos, step="semi-automatic", out=out, name="object", grid=grid)
    counts = {image.name: len(objects) for image, _, objects in read_coco_masks(out)}
    assert counts == {"a.png": 2, "b.png": 2}
    out = photos / "auto.json"
    annotate(str(model), photos, step="automatic", out=out, name="object", grid=grid)
    notes = json.loads(out.read_text())["annotations"]
    assert [note["stability_score"] for note in notes] == [0.97] * 4
    assert "2 pictures done, 4 objects" in capsys.readouterr().out


def test_a_bad_picture_is_passed_over(model, photos, monkeypatch, capsys):
    (photos / "aa.png").write_bytes((photos / "a.png").read_bytes()[:200])
    found = [MaskedObject(RunLengths.of(np.ones((48, 64), dtype=bool)))]
    monkeypatch.setattr(promptable_engine, "propose", lambda prompted, image, options: found)
    grid, out = EverythingOptions(points=2), photos / "auto.json"
    assert annotate(str(model), photos, step="automatic", out=out, name="object", grid=grid) == 0
    said = capsys.readouterr().out
    assert "aa.png: cannot be decoded" in said
    assert "1 pictures could not be read" in said
    assert "2 pictures done, 2 objects" in said
    # Nothing but bad ones is a failure.
    assert annotate(str(model), photos / "aa.png", step="automatic", out=photos / "n.json", name="o", grid=grid) == 1


def test_enormous_pictures_are_annotated(model, tmp_path, monkeypatch, capsys):
    Image.effect_noise((400, 240), 40).convert("RGB").save(tmp_path / "big.jpg")
    monkeypatch.setattr("volvelle.data.images.MAX_PIXELS", 1000)
    monkeypatch.setattr(promptable_engine, "SHOWN", 10_000)
    monkeypatch.setattr("sys.stdin", io.StringIO("90,120\nkeep\n10,20\n"))
    annotate(str(model), tmp_path, step="assisted", out=None, name="thing", grid=EverythingOptions(points=2))
    assert "400 x 240" in capsys.readouterr().out
    assert Image.open(tmp_path / PREVIEW).size == (100, 60)


def test_numbers_that_are_none_are_not_understood(model, photos, monkeypatch, capsys):
    typed = "nan,3 / inf,3 / box 1,2,nan,4 / drop nan / drop inf / - 1,-inf / stop"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed.replace(" / ", "\n")))
    grid = EverythingOptions(points=2)
    assert annotate(str(model), photos, step="assisted", out=None, name="thing", grid=grid) == 0
    assert capsys.readouterr().out.count("not understood") == 6


def test_proposals_and_clicks_share_an_embedding(model, photos, monkeypatch):
    seen, embed = [], Promptable.embed
    monkeypatch.setattr(Promptable, "embed", lambda self, image: seen.append(1) or embed(self, image))
    monkeypatch.setattr("sys.stdin", io.StringIO("20,20\nnext\nnext\n"))
    grid = EverythingOptions(points=2, iou=0.0, stability=0.0)
    annotate(str(model), photos, step="semi-automatic", out=None, name="thing", grid=grid)
    assert len(seen) == 2


def test_what_the_model_proposes_passes_both_limits(model):
    torch.manual_seed(0)
    prompted = Promptable(sam("lite0", size=64))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    every = propose(prompted, image, EverythingOptions(points=3, iou=0.0, stability=0.0, nms=1.0))
    assert every
    limit = float(np.median([one.facts["stability_score"] for one in every]))
    some = propose(prompted, image, EverythingOptions(points=3, iou=0.0, stability=min(1.0, limit), nms=1.0))
    assert len(some) == sum(one.facts["stability_score"] >= limit for one in every)


def test_masks_in_letters():
    mask = np.zeros((40, 80), dtype=bool)
    mask[10:30, 20:60] = True
    lines = drawn(mask, [Click(45, 25, 1), Click(2, 2, 0)], columns=16)
    assert lines == ["-" + "." * 15, "....########....", "....#####+##....", "." * 16]
