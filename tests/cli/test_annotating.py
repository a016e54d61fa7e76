"""`annotate`: a session of clicks, what is typed, proposals, and the file that the next training reads."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from volvelle.cli.annotating import PREVIEW, annotate, drawn
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
    assert (kept.name, kept.facts["point_coords"]) == ("cell", [[20, 20], [24, 20]])
    assert one.answer is None
    assert one.draw((2, 3, 12, 9)).mask.sum() == 60
    assert one.prompted.multimask[-1] is False
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
