"""Measuring Segment Anything by clicks: what is ranked first counts, void does not; replays; checkpoints."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tests.train.shapes import random_sam, recipe, run_of, shapes

from volvelle.cli.main import main
from volvelle.data.promptable import read_objects
from volvelle.data.promptable_clicks import Click
from volvelle.data.promptable_objects import Listed
from volvelle.data.run_lengths import RunLengths
from volvelle.systems.segmentation.sam.load import write_sam
from volvelle.train import promptable_measure
from volvelle.train.promptable_measure import Measured, Seen, measure, replay


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return shapes(tmp_path_factory.mktemp("measured"))


@pytest.fixture(scope="module")
def model():
    """No test changes it."""
    return random_sam()


class Oracle:
    """A model that answers the first click with a share of what is there, and each further click with more of it."""

    def __init__(self, truth, ranked):
        self.truth, self.ranked, self.asked = truth, ranked, []

    def embed(self, image):
        return image

    def predict(self, embedding, *, points=None, labels=None, boxes=None, masks=None, multimask=True):
        count = 1 if points is None else points.shape[1]
        self.asked.append((points, labels, boxes, masks, multimask))
        k = len(boxes if points is None else points)
        shares = (0.5, 0.25, 1.0) if multimask else (min(1.0, 0.25 + 0.25 * count),)
        found = torch.zeros(k, len(shares), *self.truth[0].shape, dtype=torch.bool)
        for i, truth in enumerate(self.truth[:k]):
            at = np.argwhere(truth)
            for m, share in enumerate(shares):
                for y, x in at[: round(share * len(at))]:
                    found[i, m, y, x] = True
        iou = torch.full((k, len(shares)), 0.1)
        iou[:, self.ranked if multimask else 0] = 0.9
        return type("Masks", (), {"masks": found, "iou": iou, "logits": torch.zeros(k, len(shares), 4, 4)})


def test_measuring_takes_what_the_model_ranks_first(data, model, monkeypatch):
    folder = read_objects(data, least=60)["val"].part([0])
    truths = [folder[0][1].mask(i) for i in range(2)]
    for ranked, first in ((0, 0.5), (1, 0.25), (2, 1.0)):
        oracle = Oracle(truths, ranked)
        monkeypatch.setattr(promptable_measure, "Promptable", lambda _, oracle=oracle: oracle)
        found = measure(model, folder, clicks=(1, 2, 3), more=True)
        assert found.metrics["iou_1"] == pytest.approx(first, abs=0.01)
        assert found.metrics["best_of_three"] == pytest.approx(1.0)
        assert found.metrics["single"] == pytest.approx(0.5, abs=0.01)
        assert found.metrics["iou_2"] == pytest.approx(0.75, abs=0.01)
        assert found.metrics["iou_3"] == pytest.approx(1.0)
        multimask = [asked[4] for asked in oracle.asked]
        assert multimask == [True, False, False, False, False]  # one click, the single mask, boxes, two more clicks
        points, labels, _, before, _ = oracle.asked[-1]
        assert points.shape == (2, 3, 2)
        assert labels.all()
        assert before is not None
    assert [name for name, *_ in found.rows(folder.classes)] == ["red", "blue"]


def test_void_pixels_count_neither_way(data, model, monkeypatch):
    folder = read_objects(data, least=60)["val"].part([0])
    _, objects = folder[0]
    truths = [objects.mask(i) | objects.void() for i in range(2)]  # answers that spill over what is void
    monkeypatch.setattr(promptable_measure, "Promptable", lambda _: Oracle(truths, 2))
    assert measure(model, folder, clicks=(1,)).metrics == {"iou_1": 1.0}


class Crowded:
    """One picture with three objects in a list, of which a crowd hides half, all and nothing."""

    def __init__(self):
        self.truths, nothing = np.zeros((3, 48, 64), dtype=bool), np.zeros((48, 64), dtype=bool)
        self.truths[0, 4:14, 4:24] = self.truths[1, 20:30, 4:14] = self.truths[2, 34:44, 34:54] = True
        nothing[:, :14] = True
        self.objects = Listed([RunLengths.of(mask) for mask in self.truths], [0, 0, 0], nothing)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return Image.new("RGB", (64, 48)), self.objects


def test_what_of_an_object_is_void_counts_neither_way(model, monkeypatch):
    folder = Crowded()
    known = ~folder.objects.void()
    asked = Oracle([folder.truths[0] & known, folder.truths[2]], 2)
    monkeypatch.setattr(promptable_measure, "Promptable", lambda _: asked)
    found = measure(model, folder, clicks=(1,), more=True)
    assert [(one.index, one.area) for one in found.objects] == [(0, 100), (2, 200)]
    assert found.metrics["iou_1"] == 1.0
    assert all(known[one.clicks[0].y, one.clicks[0].x] for one in found.objects)


def test_the_worst_are_of_different_pictures():
    def seen(picture, iou):
        return Seen(picture, 0, 0, 9, [Click(0, 0, 1)], [iou])

    found = Measured([seen(0, 0.3), seen(0, 0.1), seen(1, 0.2), seen(2, 0.9)], {})
    assert [(one.picture, one.ious[0]) for one in found.worst(2)] == [(0, 0.1), (1, 0.2)]


def test_replayed_answers_are_those_that_were_measured(data, model):
    folder = read_objects(data, least=60)["val"].part([1])
    found = measure(model, folder, clicks=(1, 3))
    image, objects = folder[0]
    for one in found.objects:
        masks = replay(model, image, one.clicks)
        truth, known = objects.mask(one.index), ~objects.void()
        ious = [(m & truth & known).sum() / max(1, ((m | truth) & known).sum()) for m in masks]
        assert ious == pytest.approx(one.ious)


def test_a_checkpoint_is_measured_too(data, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_sam(model, tmp_path / "net")
    asked = []
    monkeypatch.setattr(
        promptable_measure, "measure", lambda *given, **named: asked.append(named) or measure(*given, **named)
    )
    assert main(["eval", "net", f"data={data}", "precision=fp32"]) == 0
    assert "one click" in capsys.readouterr().out
    image = data / "images" / "val" / "0.png"
    note = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 4, 28, 36], "segmentation": []}
    lists = {"images": [{"id": 1, "file_name": str(image)}], "categories": [{"id": 1, "name": "cell"}]}
    (tmp_path / "val.json").write_text(json.dumps({**lists, "annotations": [note]}))
    assert main(["eval", "net", f"data={tmp_path / 'val.json'}"]) == 0
    assert (tmp_path / "predictions" / "eval-val.html").is_file()
    # A run is measured in what it was trained in, or in what is asked for.
    run = run_of(tmp_path, "p", recipe(data, precision="bf16"))
    write_sam(model, run.path / "weights")
    assert main(["eval", str(run.path), f"data={data}"]) == 0
    assert main(["eval", str(run.path), f"data={data}", "precision=fp32"]) == 0
    assert [one["precision"] for one in asked] == ["fp32", "bf16", "fp32"]
    assert main(["eval", str(run.path), f"data={data}", "precision=int8"]) == 2
    assert "is for language models" in capsys.readouterr().err
