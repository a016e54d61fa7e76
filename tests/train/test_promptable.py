"""`train promptable`: losses against loops, the objective's rounds, the recipe from end to end, boxes."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tests.train.shapes import random_sam, recipe, run_of, shapes, write

from volvelle.cli import prompting
from volvelle.data.boxes import Boxes, BoxFolder, write_coco
from volvelle.data.promptable import read_objects
from volvelle.data.promptable_clicks import Click
from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.segmentation.sam.load import write_sam
from volvelle.train import promptable_objective
from volvelle.train.observer import Quiet
from volvelle.train.options import from_dict, to_dict
from volvelle.train.promptable import _predict_command, build_model, read_sets, train_promptable, training_loader
from volvelle.train.promptable_boxes import Boxed, measure_boxes, neighbours, one_box
from volvelle.train.promptable_losses import best_of, mask_losses, overlaps
from volvelle.train.promptable_measure import Measured, Seen
from volvelle.train.promptable_objective import PromptObjective, Target
from volvelle.train.recipes.promptable import TrainPromptable
from volvelle.train.resume import resume_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def model():
    """No test changes it."""
    return random_sam()


def loop_losses(logits, cover, known):
    """Focal loss, dice loss and IoU of one mask, cell by cell."""
    focal = both = seen = there = weight = meets = found = 0.0
    for z, t, w in zip(logits.flatten().tolist(), cover.flatten().tolist(), known.flatten().tolist(), strict=True):
        p = 1 / (1 + np.exp(-z))
        focal += w * abs(t - p) ** 2 * -(t * np.log(p) + (1 - t) * np.log(1 - p))
        both, seen, there, weight = both + w * p * t, seen + w * p, there + w * t, weight + w
        meets, found = meets + w * t * (z > 0), found + w * (z > 0)
    return focal / max(1, weight), 1 - (2 * both + 1) / (seen + there + 1), meets / max(1e-6, found + there - meets)


def test_losses_and_overlaps_equal_loops():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 2, 5, 4) * 3
    cover, known = torch.rand(2, 3, 5, 4).round(decimals=1), torch.tensor([0.0, 0.5, 1.0])[torch.randint(3, (2, 5, 4))]
    losses, ious = mask_losses(logits, cover, known), overlaps(logits, cover, known)
    bolder = mask_losses(logits, cover, known, 3.0)
    for b, k, m in np.ndindex(2, 3, 2):
        focal, dice, iou = loop_losses(logits[b, k, m].double(), cover[b, k].double(), known[b].double())
        assert losses[b, k, m].item() == pytest.approx(20 * focal + dice, rel=1e-4)
        assert bolder[b, k, m].item() == pytest.approx(3 * focal + dice, rel=1e-4)
        assert ious[b, k, m].item() == pytest.approx(iou, rel=1e-4, abs=1e-6)
    nothing = mask_losses(logits, cover, torch.zeros_like(known))
    assert torch.isfinite(nothing).all()
    assert mask_losses(logits.bfloat16(), cover, known).dtype == torch.float32


def test_only_the_best_mask_learns():
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 3, 4, 4, requires_grad=True)
    cover, known = torch.randint(2, (1, 2, 4, 4)).float(), torch.ones(1, 4, 4)
    losses = mask_losses(logits, cover, known)
    best_of(losses).sum().backward()
    for prompt in range(2):
        learns = logits.grad[0, prompt].abs().sum((1, 2)) > 0
        assert learns.tolist() == [i == losses[0, prompt].argmin() for i in range(3)]
    logits.grad = None
    best_of(mask_losses(logits, cover, known), 0.3).sum().backward()
    assert (logits.grad.abs().sum((3, 4)) > 0).all()


def test_cells_that_are_partly_void_count_by_what_is_known():
    masks, known = torch.zeros(1, 1, 4, 8, dtype=torch.uint8), torch.ones(1, 4, 8, dtype=torch.uint8)
    masks[..., :2, :4], known[:, 2:, :4], known[:, :, 4:] = 1, 0, 0
    target = Target.of({"masks": masks, "known": known, "there": torch.ones(1, 1, dtype=torch.bool)})
    assert target.cover[0, 0].tolist() == [[1.0, 0.0]]  # all that is known of the first cell
    assert target.known[0].tolist() == [[0.5, 0.0]]


def test_a_crop_lies_in_the_input_as_a_whole_picture_would(data, model):
    """The prompts of a crop at the corner of the input, and their places, are those of the whole input."""
    options = recipe(data, crop=(64, 64))
    objective = PromptObjective(model, options)
    embedding = torch.randn(1, 256, 3, 2)
    for seed in range(4):
        corner, position = objective._place(embedding, random.Random(seed))
        left, top = (corner / 16).int().tolist()
        whole = objective.model.prompt_encoder.position()
        assert torch.equal(position, whole[:, :, top : top + 3, left : left + 2])
        points = objective.model.prompt_encoder.embed(corner.view(1, 1, 1, 2) + 7.5, torch.ones(1, 1, 1).long())
        kind = objective.model.prompt_encoder.point_embeddings[1].weight
        torch.testing.assert_close(points[0, 0, 0] - kind[0], whole[0, :, top, left])


def test_further_clicks_are_where_the_answers_are_wrong(data, model):
    objective = PromptObjective(model, recipe(data, central=1.0))
    cover = torch.zeros(1, 2, 16, 16)
    cover[:, :, 2:7, 3:8] = 1
    answer = torch.where(cover > 0, 1.0, -1.0)
    answer[0, 0, 9:14, 9:14] = 1.0  # too much in the first; nothing wrong in the second
    target = Target(cover, torch.ones(1, 16, 16), torch.ones(1, 2, dtype=torch.bool))
    points, labels = objective._clicks(answer, target, torch.tensor([16.0, 32.0]), random.Random(0))
    assert labels.tolist() == [[[0], [-1]]]
    assert points[0, 0, 0].tolist() == [11 * 4 + 1.5 + 16, 11 * 4 + 1.5 + 32]


@pytest.mark.slow
def test_it_learns_what_it_is_asked(data):
    """Thirty steps on one batch: both losses fall far, and every weight that can learn has a gradient."""
    torch.manual_seed(0)
    # Of three masks only the best one learns, and one that never is the best stays idle: hence a share for the others.
    options = recipe(data, boxes=0.3, refined=2, batch=4, others=0.1)
    model = build_model(options)
    objective = PromptObjective(model, options)
    batch = next(iter(training_loader(options, read_objects(data, least=60)["train"]))).value
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    values, learnt = [], set()
    for step in range(30):
        objective.step = step
        loss = objective.loss(batch)
        optimizer.zero_grad()
        loss.value.backward()
        learnt |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        values.append(float(loss.metrics["later_loss"]))
    assert np.mean(values[-5:]) < 0.5 * np.mean(values[:5])
    idle = {name for name, _ in model.named_parameters()} - learnt
    assert all(name.endswith("k_proj.bias") for name in idle)  # these shift all scores of a softmax alike
    nothing = {**batch, "there": torch.zeros_like(batch["there"])}
    assert objective.loss(nothing).value.item() == 0


def test_end_to_end(data, tmp_path, capsys):
    options = recipe(data, precision="bf16", average=0.9)
    run = run_of(tmp_path, "a", options)
    outcome = train_promptable(options, run, observer=Quiet())
    assert outcome.interrupted is None
    assert set(outcome.after) == {"iou_1", "iou_3", "best_of_three", "single", "iou_box"}
    assert all(0 <= value <= 1 for value in outcome.after.values())
    assert outcome.after["best_of_three"] >= outcome.after["iou_1"]
    page = (run.path / "report.html").read_text()
    for words in ("the val part of", "By clicks", "best of three", "4 objects in 2 pictures", "After one click"):
        assert words in page
    assert page.count("data:image/png") == 2
    assert prompting.is_promptable(run.path)
    assert prompting.evaluate(run.path, str(data)) == 0
    assert f"{100 * outcome.after['iou_1']:.2f} %" in capsys.readouterr().out
    with pytest.raises(UsageError, match="has no test part"):
        prompting.evaluate(run.path, str(data), split="test")
    # Another training begins with these weights.
    again = build_model(recipe(data, weights=str(run.path)))
    assert again.training
    assert again.config.size == 64
    with pytest.raises(UsageError, match="is lite0 at 64 pixels"):
        build_model(recipe(data, weights=str(run.path), size=128, crop=(64, 64)))


@pytest.mark.slow
def test_a_run_that_is_cut_goes_on_bit_for_bit(data, tmp_path):
    options = recipe(data, average=0.9, steps=3)
    whole = run_of(tmp_path, "whole", options)
    expected = train_promptable(options, whole, observer=Quiet())
    cut = run_of(tmp_path, "cut", options)
    train_promptable(options, cut, observer=Quiet())
    for later in ("step-00000002", "step-00000003"):
        shutil.rmtree(cut.path / "checkpoints" / later)
    for file in (cut.path / "weights").iterdir():
        file.unlink()
    cut.update_manifest(status="interrupted")
    with pytest.raises(VolvelleError, match="has no weights yet"):
        prompting.evaluate(cut.path, str(data))
    outcome = resume_run(cut.path, observer=Quiet())
    assert outcome.after == expected.after
    same = [(run.path / "weights" / "model.safetensors").read_bytes() for run in (whole, cut)]
    assert same[0] == same[1]


def test_the_sets_share_no_picture(data):
    for options, where in ((recipe(data), "the val part"), (recipe(data, held_out=str(data)), str(data))):
        sets = read_sets(options, data, Quiet())
        names = [set(part.files) for part in (sets.train, sets.selection, sets.test)]
        assert [len(part) for part in names] == [6, 2, 2]
        assert not names[0] & names[1]
        assert where in sets.where


def test_pictures_without_objects_are_no_set(tmp_path):
    write(tmp_path, "train", 8, 0)
    (tmp_path / "classes.txt").write_text("background\nred\nblue\n")
    sets = read_sets(recipe(tmp_path), tmp_path, Quiet())
    for part, what in ((sets.test, "to measure on"), (sets.selection, "to choose by"), (sets.train, "to train on")):
        for image in part.files:
            mask = tmp_path / "masks" / "train" / image.name
            mask.rename(mask.with_suffix(".kept"))
            Image.new("L", (64, 48)).save(mask)
        with pytest.raises(VolvelleError, match=f"no object in the {len(part)} pictures {what}"):
            read_sets(recipe(tmp_path), tmp_path, Quiet())
        for image in part.files:
            mask = tmp_path / "masks" / "train" / image.name
            mask.with_suffix(".kept").rename(mask)


def test_the_next_command_asks_for_something(data, tmp_path):
    test = read_objects(data, least=60)["val"]
    run = run_of(tmp_path, "n", recipe(data))
    some = Measured([Seen(1, 0, 0, 9, [Click(7, 5, 1)], [0.5])], {})
    assert _predict_command(run, test, some) == f"volvelle predict {run.path} {test.files[1]} points=7,5"
    assert _predict_command(run, test, Measured([], {})).endswith(f"{test.files[0]} everything=true")


def test_boxes_as_prompts(data, model, tmp_path):
    masks = np.zeros((2, 10, 20), dtype=bool)
    masks[0, 2:8, 1:9], masks[1, 2:8, 8:15] = True, True
    boxes = [(1.0, 2.0, 10.0, 8.0), (8.0, 2.0, 15.0, 8.0)]
    assert one_box(masks[1], boxes[1]) == (1.0, 1.0)
    assert one_box(masks[0], (1, 2, 5, 8)) == (0.5, 0.5)
    ((overlap, of_boxes),) = neighbours(masks, boxes)
    assert overlap == pytest.approx(6 / 42)
    assert of_boxes == pytest.approx(12 / 42)
    assert neighbours(masks, [boxes[0], (12.0, 2.0, 15.0, 8.0)]) == []
    assert Boxed(np.zeros((0, 2)), np.zeros((0, 2)), 0).metrics["inside"] == -1
    image = data / "images" / "val" / "0.png"
    corners = torch.tensor([[2.0, 4.0, 30.0, 40.0], [20.0, 4.0, 60.0, 40.0]])
    there = Boxes(corners, torch.zeros(2).long(), torch.zeros(2).bool(), torch.ones(2))
    none = Boxes(corners[:0], torch.zeros(0).long(), torch.zeros(0).bool(), torch.ones(0))
    folder = BoxFolder(data, [image, image.with_name("1.png")], [there, none], [(64, 48)] * 2, ("cell",))
    found = measure_boxes(model, folder)
    assert len(found.boxes) + found.empty == 2
    assert len(found.pairs) <= 1
    options = recipe(data)
    run = run_of(tmp_path, "b", options)
    write_sam(model, run.path / "weights")
    write_coco(folder, tmp_path / "val.json")
    assert prompting.evaluate(run.path, str(tmp_path / "val.json")) == 0
    assert (run.path / "eval-val.html").read_text().count("data:image/png") == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"crop": (50, 64)}, "multiples of 16"),
        ({"crop": (0, 64)}, "both sides or none"),
        ({"model": "vit_b"}, "takes only whole inputs"),
        ({"model": "vit_x"}, "not a Segment Anything model"),
        ({"shard": "fsdp"}, "not for promptable"),
        ({"refined": 3}, "refined"),
        ({"clicks": (0,)}, "clicks"),
        ({"scale": (2.0, 1.0)}, "least,largest"),
        ({"boxes": 1.5}, "between 0 and 1"),
        ({"others": 1.5}, "others: must lie between 0 and 1"),
        ({"focal": -1.0}, "focal, classes_weight, encoder_rate, samples: from 0 on"),
    ],
)
def test_options_that_make_no_sense(data, more, message):
    with pytest.raises(UsageError, match=message):
        recipe(data, **more)


def test_options_go_round(data):
    options = recipe(data)
    assert from_dict(TrainPromptable, to_dict(options)) == options
    assert recipe(data, crop=(0, 0)).crop_size == (64, 64)
    with pytest.raises(UsageError, match="imagenet"):
        build_model(recipe(data, model="vit_b", crop=(0, 0), weights="imagenet"))


def test_the_best_moment_is_of_what_is_trained(data, model, monkeypatch):
    """IoU by clicks and by boxes weigh as often as each is asked: where boxes alone are, clicks do not choose."""
    metrics = {"iou_1": 0.2, "iou_box": 0.8, "best_of_three": 0.3, "single": 0.1}
    monkeypatch.setattr(promptable_objective, "measure", lambda *args, **options: Measured([], metrics))
    for share, wanted in ((1.0, 0.8), (0.0, 0.2), (0.5, 0.5)):
        options = recipe(data, boxes=share)
        objective = PromptObjective(model, options, selection=read_objects(data, least=60)["train"])
        assert objective.evaluate() == pytest.approx({"iou": wanted, "iou_1": 0.2, "iou_box": 0.8})
        assert objective.best == ("iou", "max")
