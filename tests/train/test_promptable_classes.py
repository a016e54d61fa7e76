"""The classes of cells beside clicks: the loss against a loop, whom it reaches, and that it stays out of the result."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.systems.segmentation.sam import small
from tests.train.shapes import recipe, run_of, shapes

from volvelle.data.masks_labels import VOID
from volvelle.data.promptable import read_objects
from volvelle.errors import UsageError
from volvelle.systems.segmentation.sam.layers import Features
from volvelle.systems.segmentation.sam.load import load_sam
from volvelle.train.observer import Quiet
from volvelle.train.promptable import build_model, train_promptable, training_loader
from volvelle.train.promptable_classes import ClassHead, shares_of_cells
from volvelle.train.promptable_objective import PromptObjective


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return shapes(tmp_path_factory.mktemp("classes"))


def maps(seed=0, shape=(2, 8, 12), classes=3):
    draw = torch.Generator().manual_seed(seed)
    found = torch.randint(0, classes + 1, shape, generator=draw)
    return torch.where(found == classes, VOID, found).to(torch.uint8)


def test_the_loss_equals_a_loop():
    torch.manual_seed(0)
    config = small.config(32)
    head, classes = ClassHead(config, 3), maps(shape=(2, 32, 32))
    classes[:, :16, :16] = VOID
    seen = Features(torch.randn(2, 64, 2, 2))
    with torch.no_grad():
        logits, found = head(seen).double(), head.loss(seen, classes).item()
    counts = np.zeros((2, 2, 2, 3))
    for b, y, x in np.ndindex(2, 32, 32):
        if classes[b, y, x] != VOID:
            counts[b, y // 16, x // 16, classes[b, y, x]] += 1
    shares = counts / np.maximum(1, counts.sum(-1, keepdims=True))
    assert shares[:, 0, 0].sum() == 0
    frequency = shares.sum((0, 1, 2)) / shares.sum()
    raw = [1 / math.log(1.1 + f) for f in frequency]
    weights = [w / sum(r * f for r, f in zip(raw, frequency, strict=True)) for w in raw]
    top = bottom = 0.0
    for b, y, x, c in np.ndindex(2, 2, 2, 3):
        weight = weights[c] * shares[b, y, x, c]
        top, bottom = top - weight * logits[b, :, y, x].log_softmax(0)[c].item(), bottom + weight
    assert found == pytest.approx(top / bottom, rel=1e-5)
    assert head.loss(seen, torch.full_like(classes, VOID)).item() == 0


def test_shares_of_cells_add_up_to_what_is_known():
    classes = maps(1, (3, 16, 24))
    shares = shares_of_cells(classes, 3, 4)
    assert shares.shape == (3, 3, 4, 6)
    assert torch.equal(shares_of_cells(classes, 3, 1).argmax(1)[classes != VOID], classes[classes != VOID].long())
    known = (classes != VOID).view(3, 4, 4, 6, 4).any(4).any(2)
    torch.testing.assert_close(shares.sum(1), known.float())
    one = classes[2, 4:8, 8:12]
    assert shares[2, 1, 1, 2].item() == pytest.approx(((one == 1).sum() / (one != VOID).sum()).item())


def test_it_teaches_the_encoder_and_not_the_decoder(data):
    torch.manual_seed(0)
    options = recipe(data, model="lite0_fine", classes_weight=1.0)
    objective = PromptObjective(build_model(options), options, classes=3)
    batch = next(iter(training_loader(options, read_objects(data, least=60)["train"]))).value
    assert objective.classes is not None
    seen = objective.model.image_encoder.features(objective.model.preprocessing.normalise(batch["images"]))
    objective.classes.loss(seen, batch["classes"]).backward()
    named = objective.model.named_parameters()
    reached = {name.split(".")[0] for name, p in named if p.grad is not None and p.grad.any()}
    assert reached == {"image_encoder"}
    assert all(p.grad is not None and p.grad.any() for p in objective.model.image_encoder.quarter.parameters())


def test_where_there_is_nothing_to_name_nothing_changes(data):
    """Without classes, or with a weight of 0, the loss is the same to the bit, and nothing more is trained."""
    values = []
    batch = next(iter(training_loader(recipe(data), read_objects(data, least=60)["train"]))).value
    for weight, classes in ((1.0, None), (0.0, 3), (1.0, 3)):
        torch.manual_seed(0)
        options = recipe(data, classes_weight=weight)
        objective = PromptObjective(build_model(options), options, classes=classes)
        torch.manual_seed(1)  # what stochastic depth drops
        found = objective.loss(batch)
        values.append(found.value.item())
        assert len(objective.modules()) == 1 + ("classes_loss" in found.metrics)
    assert values[0] == values[1]
    assert values[2] == pytest.approx(values[0] + found.metrics["classes_loss"].item(), rel=1e-5)
    assert set(objective.phases(2)[0].parameters) >= {"classes.layer.weight", "classes.layer.bias"}
    with pytest.raises(UsageError, match=r"classes_weight, .*: from 0 on"):
        recipe(data, classes_weight=-1.0)


def test_only_maps_of_classes_have_some(data):
    assert read_objects(data)["train"].parted
    assert not read_objects(data, numbers="objects")["train"].parted
    options = recipe(data, numbers="objects")
    batch = next(iter(training_loader(options, read_objects(data, least=60, numbers="objects")["train"]))).value
    assert (batch["classes"] == VOID).all()


def test_the_head_is_in_the_checkpoint_and_not_in_the_result(data, tmp_path):
    options = recipe(data, steps=1, classes_weight=1.0)
    run = run_of(tmp_path, "a", options)
    train_promptable(options, run, observer=Quiet())
    assert "classes_loss" in (run.path / "metrics.jsonl").read_text()
    assert not any(name.startswith("classes") for name in load_sam(run.path).state_dict())
    files = [file for file in (run.path / "checkpoints").rglob("*") if file.is_file()]
    assert any(b"classes.layer.weight" in file.read_bytes() for file in files)
