"""`train detect`: the recipe from end to end on a handful of pictures, resuming, measuring and drawing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from volvelle.cli import detecting
from volvelle.data.boxes import Boxes, BoxFolder, read_boxes, write_coco
from volvelle.data.boxes_augment import Fit, Fitted
from volvelle.errors import UsageError, VolvelleError
from volvelle.parts.metrics.mean_average_precision import MeanAveragePrecision
from volvelle.runs import RunFolder
from volvelle.systems.detection import detector, named, read_detector, write_detector
from volvelle.systems.detection.targets import Targets
from volvelle.train.detect import build_model, read_sets, step_memory, train_detect
from volvelle.train.detect_measure import UNSURE, Measured, judged, measure, metrics_of
from volvelle.train.detect_objective import magnify
from volvelle.train.detect_pictures import Drawn, draw_boxes
from volvelle.train.observer import Observer, Quiet
from volvelle.train.options import from_dict, to_dict
from volvelle.train.phase import adamw
from volvelle.train.recipes.detect import TrainDetect
from volvelle.train.resume import resume_run


def picture(draw):
    """A dark ground with one to three bright squares or discs, and where they are."""
    image = draw.integers(10, 50, (72, 96, 3)).astype(np.uint8)
    corners, labels = [], []
    for column in range(int(draw.integers(1, 4))):
        side, label = int(draw.integers(16, 28)), int(draw.integers(0, 2))
        left, top = 32 * column + int(draw.integers(0, 32 - side + 1)), int(draw.integers(0, 72 - side))
        y, x = np.mgrid[:side, :side] - (side - 1) / 2
        shape = (x**2 + y**2 <= (side / 2) ** 2) if label else np.ones((side, side), dtype=bool)
        image[top : top + side, left : left + side][shape] = (230, 220, 60) if label else (60, 180, 240)
        corners.append([left, top, left + side, top + side])
        labels.append(label)
    boxes = torch.tensor(corners, dtype=torch.float32)
    k = len(labels)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return Image.fromarray(image), Boxes(boxes, torch.tensor(labels), torch.zeros(k, dtype=torch.bool), areas)


def write(folder, part, count, seed):
    draw = np.random.default_rng(seed)
    (folder / "images" / part).mkdir(parents=True)
    files, boxes = [], []
    for i in range(count):
        image, there = picture(draw)
        files.append(folder / "images" / part / f"{i}.png")
        image.save(files[-1])
        boxes.append(there)
    write_coco(BoxFolder(folder, files, boxes, [(96, 72)] * count, ("square", "disc")), folder / f"{part}.json")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write(folder, "train", 12, 0)
    write(folder, "val", 4, 1)
    return folder


def recipe(data, **more):
    options = {
        "data": str(data), "size": 64, "anchors": 4, "steps": 3, "batch": 4, "precision": "fp32", "warmup": 1.0,
        "selection_share": 0.2, "average": None, "evaluate_every": 2, "checkpoint_every": 1, "keep_last": 9,
        "samples": 1,
    }  # fmt: skip
    return TrainDetect(**{**options, **more})


def run_of(tmp_path, name, options):
    return RunFolder.create(name, root=tmp_path, kind="detect", config=to_dict(options))


def test_end_to_end(data, tmp_path, capsys):
    options = recipe(data, average=0.9, multi_scale=(1.0, 1.5), precision="bf16")
    run = run_of(tmp_path, "a", options)
    outcome = train_detect(options, run, observer=Quiet())
    assert outcome.interrupted is None
    assert {"map", "map_50", "mar_100", "voc_map", "voc07_map"} <= set(outcome.after)
    page = (run.path / "report.html").read_text()
    for words in ("the val part of", "objectness loss", "Precision over recall", "Mean average precision on"):
        assert words in page
    assert page.count("data:image/png") == 2
    train = [r for r in run.metrics() if r.get("event") == "train"]
    parts = ("objectness_loss", "proposal_boxes_loss", "classes_loss", "boxes_loss")
    assert train[0]["loss"] == pytest.approx(sum(train[0][name] for name in parts), rel=1e-4)
    # eval finds what training found, and predict draws boxes.
    assert detecting.is_detection(run.path)
    assert detecting.evaluate(run.path, str(data)) == 0
    assert f"{100 * outcome.after['voc_map']:.2f} %" in capsys.readouterr().out
    photo = data / "images" / "val" / "0.png"
    found = detecting.predict(run.path, [photo, photo], tmp_path / "out", score=0.0)
    assert Image.open(found[0]["boxes"]).size == (420, 315), "small pictures are drawn larger"
    assert found[1]["boxes"] != found[0]["boxes"]
    for entry in found[0]["objects"]:
        x1, y1, x2, y2 = entry["box"]
        assert 0 <= x1 < x2 <= 96
        assert 0 <= y1 < y2 <= 72
    with pytest.raises(UsageError, match="has no test part"):
        detecting.evaluate(run.path, str(data), split="test")


def test_a_run_begins_with_the_detector_of_another(data, tmp_path):
    options = recipe(data, steps=1)
    first = run_of(tmp_path, "first", options)
    train_detect(options, first, observer=Quiet())
    trained = read_detector(first.path / "weights").state_dict()
    train = read_sets(recipe(data), data, Quiet()).train
    for weights in (first.path, first.path / "weights"):
        model = build_model(recipe(data, weights=str(weights), anchors=3), train, Quiet()).state_dict()
        assert all(torch.equal(model[name], trained[name]) for name in model if not name.startswith("proposer."))
    with pytest.raises(VolvelleError, match="nowhere"):
        build_model(recipe(data, weights=str(tmp_path / "nowhere")), train, Quiet())


def test_weights_say_how_pictures_are_resized(data, tmp_path):
    options = recipe(data, stretch=False)
    run = run_of(tmp_path, "narrow", options)
    weights, photo = run.path / "weights", data / "images" / "val" / "0.png"
    write_detector(build_model(options, read_sets(options, data, Quiet()).train, Quiet()), weights)
    for folder in (run.path, weights):  # the weights alone are enough
        assert detecting.is_detection(folder)
        model, view = detecting.open_detector(folder)
        assert (model.config.stretch, view) == (False, Fit(64, stretch=False))
    found = [detecting.predict(one, [photo], tmp_path / "out", score=0.0)[0]["objects"] for one in (run.path, weights)]
    assert found[0] == found[1] != []
    config = weights / "config.json"
    values = json.loads(config.read_text())
    del values["stretch"]  # as they were first written: then the run's recipe says it
    config.write_text(json.dumps(values))
    assert detecting.open_detector(run.path)[1] == Fit(64, stretch=False)
    assert detecting.open_detector(weights)[1] == Fit(64, stretch=True)


def test_the_first_line_says_how_much_memory_a_step_takes(data):
    train = read_sets(recipe(data), data, Quiet()).train

    def planned(**more):
        options = recipe(data, model="thundernet-snet49", **more)
        config = replace(named(options.model, train.classes), size=options.size, deformable=options.deformable)
        return step_memory(options, config, train, torch.device("cpu"))

    plain, wide, larger = planned(), planned(batch=8), planned(multi_scale=(1.0, 2.0))
    weights = 4 * sum(p.numel() for p in detector(named("thundernet-snet49", train.classes)).parameters())
    assert plain.weights == pytest.approx(weights, rel=0.02)
    assert 1.7 < wide.activations / plain.activations < 2.3
    assert larger.activations > 1.3 * plain.activations
    assert planned(deformable=2).weights > plain.weights


def test_a_run_that_is_cut_goes_on_bit_for_bit(data, tmp_path):
    options = recipe(data, average=0.9, multi_scale=(1.0, 1.5), keep="best", steps=4)
    whole = run_of(tmp_path, "whole", options)
    expected = train_detect(options, whole, observer=Quiet())
    cut = run_of(tmp_path, "cut", options)
    train_detect(options, cut, observer=Quiet())
    for later in ("step-00000003", "step-00000004"):  # as if it had been killed after step 2
        shutil.rmtree(cut.path / "checkpoints" / later)
    for file in (cut.path / "weights").iterdir():
        file.unlink()
    cut.update_manifest(status="interrupted")
    with pytest.raises(VolvelleError, match="has no weights yet"):
        detecting.predict(cut.path, [data / "images" / "val" / "0.png"], tmp_path / "out")
    outcome = resume_run(cut.path, observer=Quiet())
    assert outcome.after == expected.after
    same = [(run.path / "weights" / "model.safetensors").read_bytes() for run in (whole, cut)]
    assert same[0] == same[1]


def test_the_sets_share_no_picture(data):
    sets = read_sets(recipe(data), data, Quiet())
    names = [set(part.files) for part in (sets.train, sets.selection, sets.test)]
    assert [len(part) for part in names] == [10, 2, 4]
    assert not names[0] & names[1]
    assert all("val" in str(file) for file in names[2])
    alone = read_sets(recipe(data), data / "train.json", Quiet())
    parts = [set(part.files) for part in (alone.train, alone.selection, alone.test)]
    assert sum(map(len, parts)) == len(parts[0] | parts[1] | parts[2]) == 12
    assert alone.where == "pictures set aside before training"
    bare = read_sets(recipe(data, selection_share=0.0), data / "train.json", Quiet())
    assert len(bare.selection) == 0
    assert not set(bare.train.files) & set(bare.test.files)
    other = read_sets(recipe(data, held_out=str(data / "val.json")), data / "train.json", Quiet())
    assert (len(other.train), len(other.selection), len(other.test)) == (10, 2, 4)


class Told(Observer):
    """Keeps what was said."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def test_what_is_mended_is_said(data, tmp_path):
    document = json.loads((data / "train.json").read_text())
    document["annotations"][0]["bbox"][2] = 0
    (tmp_path / "train.json").write_text(json.dumps(document))
    shutil.copytree(data / "images", tmp_path / "images")
    told = Told()
    read_sets(recipe(tmp_path), tmp_path, told)
    assert any("annotations[0]: " in line and "has no area, left out" in line for line in told.lines)


def test_options_round_trip_and_are_checked():
    options = TrainDetect(data="d", crop=(0.5, 1.0), multi_scale=(0.75, 1.0), classes=("a", "b"))
    assert from_dict(TrainDetect, json.loads(json.dumps(to_dict(options)))) == options
    for bad, message in (
        ({"crop": (2.0, 1.0)}, "crop: wanted"),
        ({"model": "thundernet-snet50"}, "snet50"),
        ({"multi_scale": ()}, "multi_scale: "),
        ({"size": 40, "multi_scale": (0.5,)}, "size: must be at least 32"),
        ({"keep": "best", "selection_share": 0.0}, "keep=best: needs"),
        ({"upside_down": 2.0}, "upside_down: must lie"),
        ({"anchors": -1}, "must not be negative"),
        ({"shard": "fsdp"}, "not for detectors"),
        ({"stride": 8, "model": "rfcn-resnet-50"}, "stride=8: rfcn-resnet-50 has stride 16 alone"),
    ):
        with pytest.raises(UsageError, match=message):
            TrainDetect(data="d", **bad)


def test_at_stride_8_there_are_four_times_the_places(data):
    """ThunderNet then joins three maps; the anchors are those of the boxes as before."""
    found = {}
    for stride in (16, 8):
        options = recipe(data, stride=stride)
        found[stride] = build_model(options, read_sets(options, data, Quiet()).train, Quiet()).eval()
        seen = found[stride].look(
            found[stride].backbone.features(torch.zeros(1, 3, 64, 64)), torch.tensor([[64, 64]]), (64, 64)
        )
        assert seen.objectness.shape == (1, 4 * (64 // stride) ** 2)
        assert found[stride].proposer.stride == stride
    assert found[8].config.rpn == found[16].config.rpn


def test_magnifying_moves_boxes_with_the_pixels():
    pixels = torch.zeros(2, 3, 64, 96)
    pixels[:, :, 16:32, 48:64] = 1.0
    boxes = torch.tensor([[[48.0, 16, 64, 32]]]).expand(2, 1, 4)
    flags = torch.ones(2, 1, dtype=torch.bool)
    targets = Targets(boxes, torch.zeros(2, 1, dtype=torch.int64), flags, ~flags)
    larger, sizes, moved = magnify(pixels, torch.tensor([[64, 96], [32, 90]]), targets, 1.5)
    assert larger.shape == (2, 3, 96, 128)  # 144 is rounded to a multiple of 32
    assert sizes.tolist() == [[96, 128], [48, 120]]
    x1, y1, x2, y2 = (round(value) for value in moved.boxes[0, 0].tolist())
    assert (x1, y1, x2, y2) == (64, 24, 85, 48)
    assert float(larger[0, 0, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].min()) > 0.9
    assert float(larger[0, 0].sum()) == pytest.approx(24 * 16 * 128 / 96, rel=0.02)


def seen(found, there):
    """A picture of `MeanAveragePrecision` from rows (x1, y1, x2, y2, label, score) and (…, label, ignored)."""
    f, t = torch.tensor(found).reshape(-1, 6), torch.tensor(there).reshape(-1, 6)
    figures = MeanAveragePrecision()
    pred = {"boxes": f[:, :4], "labels": f[:, 4].long(), "scores": f[:, 5]}
    figures.update([pred], [{"boxes": t[:, :4], "labels": t[:, 4].long(), "iscrowd": t[:, 5] > 0}])
    return figures


def test_hits_misses_and_the_score_to_trust():
    there = [[0.0, 0, 10, 10, 0, 0], [20.0, 0, 30, 10, 0, 0], [40.0, 0, 50, 10, 1, 1]]
    found = [
        [0.0, 0, 10, 10, 0, 0.9],  # right
        [0.0, 0, 10, 9, 0, 0.8],  # the same again
        [20.0, 0, 30, 10, 1, 0.7],  # the wrong class
        [40.0, 0, 50, 10, 1, 0.6],  # ignored
        [20.0, 0, 30, 10, 0, 0.1],  # right, hardly sure
    ]
    figures = seen(found, there)
    hits, missed = judged(figures.pictures[0], 0.5)
    assert hits.tolist() == [True, False, False, True, False]
    assert missed.tolist() == [False, True, False]
    assert judged(figures.pictures[0], 0.05)[1].tolist() == [False, False, False]
    measured = Measured(figures, metrics_of(figures))
    assert measured.trusted == pytest.approx(0.9)  # 2 / 3 there, 4 / 6 at the end: the surer of equals
    assert measured.worst(3, 0.5) == [0]
    assert [row[:2] for row in measured.rows(("a", "b", "c"))] == [("a", 2), ("b", 0), ("c", 0)]
    assert measured.rows(("a", "b", "c"))[2][2:] == (-1.0, -1.0, -1.0)
    assert Measured(seen([], there), {}).trusted == UNSURE


def test_boxes_come_back_to_the_pictures_own_pixels(data):
    folder = read_boxes(data)["val"]
    for view in (Fit(64), Fit(64, stretch=False), Fit(200)):
        fitted = Fitted(folder, view)
        figures = MeanAveragePrecision()
        for index in range(len(folder)):
            back = view.back(fitted[index].boxes, *folder.sizes[index])
            torch.testing.assert_close(back, folder.boxes[index].corners, atol=1e-4, rtol=0)
            pred = {"boxes": back, "labels": folder.boxes[index].labels, "scores": torch.ones(len(back))}
            target = {"boxes": folder.boxes[index].corners, "labels": folder.boxes[index].labels}
            figures.update([pred], [target])
        assert float(figures.compute()["map"]) == pytest.approx(1.0)


def test_other_classes_than_the_models_are_refused(data):
    from volvelle.systems.detection import thundernet

    with pytest.raises(VolvelleError, match="the model knows 3 classes, and the boxes have 2"):
        measure(thundernet("snet49", 3), Fitted(read_boxes(data)["val"], Fit(64)))


def test_drawing():
    image = Image.new("RGB", (60, 40))
    drawn = draw_boxes(image, [Drawn((10, 20, 50, 35), (255, 0, 0), "a cat"), Drawn((5, 5, 4, 4), (0, 255, 0))])
    assert drawn.getpixel((50, 30)) == (255, 0, 0)
    assert drawn.getpixel((30, 33)) == (0, 0, 0)
    assert image.getpixel((50, 30)) == (0, 0, 0)


def test_shares_of_the_learning_rate():
    weights = {"backbone.w": torch.nn.Parameter(torch.ones(2, 2)), "head.w": torch.nn.Parameter(torch.ones(2, 2))}
    weights["head.b"] = torch.nn.Parameter(torch.ones(2))
    options = recipe("d", learning_rate=0.1, weight_decay=0.5)
    groups = adamw(options, share=lambda name: 0.3 if name.startswith("backbone.") else 1.0)(weights).param_groups
    found = [(round(g["lr"], 6), g["weight_decay"], len(g["params"])) for g in groups]
    assert found == [(0.1, 0.5, 1), (0.1, 0.0, 1), (0.03, 0.5, 1)]
    plain = adamw(options)(weights).param_groups
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in plain] == [(0.1, 0.5, 2), (0.1, 0.0, 1)]


@pytest.mark.slow
def test_it_learns(data, tmp_path):
    options = recipe(data, steps=500, evaluate_every=None, batch=6, size=96, crop=(0.8, 1.0), checkpoint_every=None)
    outcome = train_detect(options, run_of(tmp_path, "learns", options), observer=Quiet())
    # On four pictures one object more or less is .1: .35 after 150 steps, .47 after 300, .65 after 500.
    assert outcome.after["map_50"] > 0.5
