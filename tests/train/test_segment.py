"""`train segment`: the loss, the recipe from end to end on a handful of pictures, resuming, and what is honest."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from volvelle.cli import segmenting
from volvelle.errors import UsageError, VolvelleError
from volvelle.runs import RunFolder
from volvelle.train.observer import Quiet
from volvelle.train.options import from_dict, to_dict
from volvelle.train.recipes.segment import DecoderOptions, LookOptions, TrainSegment
from volvelle.train.resume import resume_run
from volvelle.train.segment import read_sets, train_segment
from volvelle.train.segment_objective import class_weights, segmentation_loss, shrink
from volvelle.train.segment_pictures import confusion_picture, painted


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bright squares on dark grounds: 12 pictures to train on, 4 to measure on."""
    folder = tmp_path_factory.mktemp("squares")
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for kind in ("images", "masks"):
            (folder / kind / part).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((40, 56), dtype=np.uint8)
            top, left = draw.integers(0, 20), draw.integers(0, 30)
            mask[top : top + 18, left : left + 22] = 1
            mask[:2] = 255
            image = np.where(mask == 1, 220, 30)[..., None] + draw.integers(-20, 20, (40, 56, 3))
            Image.fromarray(image.astype(np.uint8)).save(folder / "images" / part / f"{i}.png")
            Image.fromarray(mask).save(folder / "masks" / part / f"{i}.png")
    (folder / "classes.txt").write_text("ground\nsquare\n")
    return folder


def recipe(data, **more):
    options = {
        "data": str(data), "backbone": "shufflenet-v2-x0.5", "weights": "none",
        "model": DecoderOptions(width=8, detail=4),
        "crop": (32, 32), "steps": 3, "batch": 4, "precision": "fp32", "selection_share": 0.2, "average": None,
        "evaluate_every": 2, "checkpoint_every": 1, "keep_last": 9, "samples": 1,
    }  # fmt: skip
    return TrainSegment(**{**options, **more})


def run_of(tmp_path, name, options):
    return RunFolder.create(name, root=tmp_path, kind="segment", config=to_dict(options))


def test_end_to_end(data, tmp_path, capsys):
    options = recipe(data, looks=LookOptions(scales=(1.0, 1.5), mirror=True), small=0.5)
    run = run_of(tmp_path, "a", options)
    outcome = train_segment(options, run, observer=Quiet())
    assert outcome.interrupted is None
    figures = {"miou", "pixel_accuracy", "mean_pixel_accuracy", "frequency_weighted_iou", "boundary_iou"}
    assert figures | {"miou_of_looks"} <= set(outcome.after)
    page = (run.path / "report.html").read_text()
    assert "the val part of" in page
    assert "confusion matrix" in page
    assert page.count("data:image/png") == 2
    assert segmenting.is_segmentation(run.path)
    # eval finds what training found, and predict writes pictures.
    assert segmenting.evaluate(run.path, str(data)) == 0
    assert f"{100 * outcome.after['miou']:.2f} %" in capsys.readouterr().out
    photo = data / "images" / "val" / "0.png"
    found = segmenting.predict(run.path, [photo, photo], tmp_path / "out")
    mask = Image.open(found[0]["mask"])
    assert (mask.mode, mask.size) == ("P", (56, 40))
    assert set(np.unique(np.asarray(mask))) <= {0, 1}
    assert sum(found[0]["classes"].values()) == pytest.approx(1)
    assert found[1]["overlay"] != found[0]["overlay"]


def test_a_run_that_is_cut_goes_on_bit_for_bit(data, tmp_path):
    options = recipe(data, average=0.9, small=0.5, steps=4)
    whole = run_of(tmp_path, "whole", options)
    expected = train_segment(options, whole, observer=Quiet())
    cut = run_of(tmp_path, "cut", options)
    train_segment(recipe(data, average=0.9, small=0.5, steps=4), cut, observer=Quiet())
    for later in ("step-00000003", "step-00000004"):  # as if it had been killed after step 2
        for file in sorted((cut.path / "checkpoints" / later).glob("*")):
            file.unlink()
        (cut.path / "checkpoints" / later).rmdir() if (cut.path / "checkpoints" / later).is_dir() else None
    cut.update_manifest(status="interrupted")
    steps = sorted(p.name for p in (cut.path / "checkpoints").glob("step-*"))
    outcome = resume_run(cut.path, observer=Quiet())
    assert steps
    assert outcome.after == expected.after


def test_the_sets_share_no_picture(data):
    sets = read_sets(recipe(data), data, Quiet())
    names = [{image for image, _ in part.pairs} for part in (sets.train, sets.selection, sets.test)]
    assert [len(part) for part in names] == [10, 2, 4]
    assert not names[0] & names[1]
    assert all("val" in str(image) for image in names[2])
    alone = read_sets(recipe(data / "images" / "train"), _flat(data), Quiet())
    parts = [{image for image, _ in part.pairs} for part in (alone.train, alone.selection, alone.test)]
    assert sum(map(len, parts)) == 16
    assert len(parts[0] | parts[1] | parts[2]) == 16
    assert alone.where == "pictures set aside before training"


def _flat(data):
    """The same pictures without parts."""
    flat = data / "flat"
    for kind in ("images", "masks"):
        for part in ("train", "val"):
            for file in (data / kind / part).iterdir():
                target = flat / kind / f"{part}{file.name}"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    return flat


def test_too_few_pictures(data, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for name in ("0.png", "1.png"):
            (tmp_path / kind / name).write_bytes((data / kind / "train" / name).read_bytes())
    with pytest.raises(VolvelleError, match="2 pictures cannot be split"):
        read_sets(recipe(tmp_path), tmp_path, Quiet())


def test_one_class_is_nothing_to_tell_apart(tmp_path):
    for kind, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / kind).mkdir()
        for i in range(4):
            Image.new(mode, (40, 40)).save(tmp_path / kind / f"{i}.png")
    with pytest.raises(VolvelleError, match="its masks hold one class"):
        read_sets(recipe(tmp_path), tmp_path, Quiet())


def test_options_round_trip_and_are_checked():
    options = TrainSegment(data="d", looks=LookOptions(scales=(1.0, 2.0)), crop=(64, 96), void=(3,), classes=("a", "b"))
    assert from_dict(TrainSegment, json.loads(json.dumps(to_dict(options)))) == options
    for bad, message in (
        ({"crop": (8, 8)}, "crop: wanted"),
        ({"scale": (2.0, 1.0)}, "scale: wanted"),
        ({"shrink": 0.0}, "shrink: must lie"),
        ({"backbone": "resnett-50"}, "resnett-50"),
        ({"batch": 1, "crop": (32, 32)}, "cannot be normalised"),
        ({"shard": "fsdp"}, "not for segmenters"),
    ):
        with pytest.raises(UsageError, match=message):
            TrainSegment(data="d", **bad)
    with pytest.raises(UsageError, match="model: kernel and width"):
        DecoderOptions(head="unet", width=0)


def test_loss_at_the_resolution_of_the_masks_equals_cross_entropy():
    torch.manual_seed(0)
    k, b, y, x = 4, 2, 6, 8
    scores, weights = torch.randn(b, k, y // 2, x // 2), torch.tensor([1.0, 2.0, 0.5, 3.0])
    target = torch.randint(0, k, (b, y // 2, x // 2))
    target[0, 0, 0] = 255
    masks = target.repeat_interleave(2, 1).repeat_interleave(2, 2).byte()  # whichever pixel is drawn is the same
    expected = torch.nn.functional.cross_entropy(scores, target, weights, ignore_index=255)
    loss = segmentation_loss(scores, masks, weights)
    torch.testing.assert_close(loss.value, expected)
    kept = target[target != 255]
    assert loss.weight == pytest.approx(float(weights[kept].sum()))


def test_each_of_four_pixels_is_drawn_and_odd_sizes_fit():
    torch.manual_seed(0)
    scores = torch.randn(1, 4, 2, 2)
    masks = torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8).repeat(1, 2, 2)
    values = {round(float(segmentation_loss(scores, masks, torch.ones(4)).value), 4) for _ in range(60)}
    assert len(values) == 4
    for size in ((5, 7), (1, 1), (2, 3)):
        masks = torch.randint(0, 4, (2, *size), dtype=torch.uint8)
        assert segmentation_loss(torch.randn(2, 4, 3, 3), masks, torch.ones(4), lovasz=0.5).value.isfinite()


def test_a_batch_of_void_has_no_loss_and_no_nan():
    scores = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = segmentation_loss(scores, torch.full((1, 8, 8), 255, dtype=torch.uint8), torch.ones(3), lovasz=1.0)
    loss.value.backward()
    assert float(loss.value) == 0
    assert scores.grad is not None
    assert not scores.grad.any()


def test_class_weights():
    f = np.array([0.7, 0.3, 0.0])
    for kind in ("none", "log", "inverse"):
        found = class_weights(f, kind)
        assert float((found * torch.from_numpy(f)).sum()) == pytest.approx(1)
        assert float(found[2]) == 0
    assert float(class_weights(f, "inverse")[1] / class_weights(f, "inverse")[0]) == pytest.approx(7 / 3)
    log = class_weights(f, "log")
    assert float(log[1] / log[0]) == pytest.approx(np.log(1.8) / np.log(1.4))


def test_shrinking_keeps_picture_and_mask_together():
    x = torch.arange(96.0).repeat(1, 3, 64, 1)
    masks = (x[:, 0] // 8).to(torch.uint8)
    small, labels = shrink(x, masks, 2 / 3)
    assert small.shape == (1, 3, 32, 64)
    assert labels.shape == (1, 32, 64)
    assert float((small[:, 0] / 8 - 0.5 - labels.float()).abs().max()) <= 0.7


def test_pictures_of_the_report():
    svg = confusion_picture(torch.tensor([[8, 2], [0, 0]]), ["a<b", "c"])
    assert "a&lt;b seen as c: 20.00% (2 pixels)" in svg
    assert svg.count("<rect") == 4
    assert painted(np.array([[1, 255]]), [(1, 1, 1), (2, 2, 2)]).tolist() == [[[2, 2, 2], [0, 0, 0]]]


@pytest.mark.slow
def test_it_learns(data, tmp_path):
    options = recipe(data, steps=60, learning_rate=3e-3, encoder_rate=1.0, evaluate_every=20, batch=8, crop=(32, 48))
    outcome = train_segment(options, run_of(tmp_path, "learns", options), observer=Quiet())
    assert outcome.after["miou"] > 0.8
