"""The memory that a training run's first line names, on one of many ranks."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from tests.train.many import run
from tests.train.test_recipes import Ear, folder, scratch

from volvelle.adapt.methods import LoRA
from volvelle.data.images_prepare import Preprocessing
from volvelle.inspect.memory_measure import measure_peak
from volvelle.inspect.memory_models import KNOWN
from volvelle.systems.backbone.load import build
from volvelle.systems.backbone.names import find_config
from volvelle.systems.language.config import GatedMLP
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.segmentation.load import segmenter
from volvelle.train import classify, estimate, segment, train_language
from volvelle.train.classify_objective import ClassifyObjective
from volvelle.train.estimate import estimate_memory, plan_language, whole_windows
from volvelle.train.language import LanguageObjective, completion_loss
from volvelle.train.options import FitOptions
from volvelle.train.recipes.classify import TrainClassify
from volvelle.train.recipes.language import ModelShape
from volvelle.train.recipes.segment import TrainSegment
from volvelle.train.segment_objective import SegmentObjective
from volvelle.train.sharded import ShardedGroup

SIZES = {"vocabulary": 1000, "width": 72, "embedding_width": 72, "head_width": 8, "mlp": GatedMLP(192)}
SMALL = dataclasses.replace(KNOWN["smollm2-135m"].config, depth=4, **SIZES)
DEEP = dataclasses.replace(SMALL, depth=14)
BATCH = whole_windows(48)(3)
METHODS = {"full": {}, "lora": {"method": LoRA(), "autocast": True, "stored": torch.bfloat16}}


@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", METHODS)
def test_a_rank_holds_what_its_plan_says(shard, method):
    given = METHODS[method]
    found = estimate_memory(SMALL, BATCH, ranks=4, shard=shard, **given)
    options = {"method": given.get("method", "full"), "stored": given.get("stored", torch.float32)}
    precision = "amp" if given.get("autocast") else "fp32"
    cards = {"device": "cpu", "gpus": "4x1", "shard": shard}
    card = plan_language(SMALL, BATCH, precision=precision, **cards, **options).card
    assert found.total == pytest.approx(card.peak, abs=8)
    assert 0 < found.communication <= card.communication


def test_a_deep_model_is_the_continuation_of_shallow_ones(monkeypatch):
    quick = estimate_memory(DEEP, BATCH, ranks=3, shard="fsdp")
    monkeypatch.setattr(estimate, "SHALLOW", 100)
    whole = estimate_memory(DEEP, BATCH, ranks=3, shard="fsdp")
    assert quick.total == pytest.approx(whole.total, rel=0.002)
    assert quick.weights == pytest.approx(whole.weights, abs=8)


def test_shares_shrink_with_the_number_of_ranks():
    one, eight = (estimate_memory(SMALL, BATCH, ranks=ranks, shard="fsdp", average=True) for ranks in (1, 8))
    assert one.communication == 0
    for part in ("weights", "optimizer"):
        assert getattr(eight, part) == pytest.approx(getattr(one, part) / 8, rel=1e-4)
    replicated = estimate_memory(SMALL, BATCH, ranks=8)
    assert replicated.weights == one.weights
    assert replicated.communication == one.weights  # the gradients once more, in buckets


def first_line(tmp_path, monkeypatch, **options):
    """The first line of a run, with its numbers to the byte."""
    monkeypatch.setattr(estimate, "_size", lambda value: f"{value} B")
    shape = ModelShape(width=64, depth=6, heads=2, context=96)
    recipe = scratch(tmp_path, steps=1, batch=1, length=16, held_out_size=2, **options)
    recipe = dataclasses.replace(recipe, model=shape)
    ear = Ear()
    train_language(recipe, folder(tmp_path, f"run{len(options)}", "language", recipe), observer=ear)
    line = next(text for text in ear.said if "; memory about" in text)
    return int(re.search(r"memory about (\d+) B", line)[1])


def test_the_first_line_counts_one_ranks_share(tmp_path, monkeypatch):
    whole = first_line(tmp_path, monkeypatch)
    shared = first_line(tmp_path, monkeypatch, ranks=2, shard="fsdp")
    assert shared < 0.8 * whole


def measured(ranks):
    """Bytes of tensors on this rank at the peak of a second step of a sharded decoder."""
    torch.set_num_threads(1)

    def setup():
        model, group = Decoder(SMALL), ShardedGroup()
        group.prepare({"model": model}, LanguageObjective.forward_methods)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def step():
            optimizer.zero_grad()
            with group.accumulating(loss, last=True):
                loss(BATCH).value.backward()
            optimizer.step()

        def loss(batch):
            return completion_loss(model, batch)

        return step

    return measure_peak(setup).peak


@pytest.mark.slow
def test_a_real_ranks_peak(tmp_path):
    """A copy that gloo makes, and frees when it gets to it, may be alive at the peak."""
    found = [outcome["value"] for outcome in run(tmp_path, 2, FitOptions(ranks=2), measured)]
    assert min(found) == pytest.approx(estimate_memory(SMALL, BATCH, ranks=2, shard="fsdp").total, rel=0.05)


def picture_step(objective, options, batch, **more):
    """The training loop's step of an objective on pictures, for real."""
    torch.set_num_threads(1)

    def setup():
        made = objective()
        [phase] = made.phases(10)
        optimizer = phase.optimizer(phase.parameters)

        def step():
            optimizer.zero_grad()
            made.train_mode()
            with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
                loss = made.loss(batch, **more).value
            loss.backward()
            optimizer.step()

        return step

    return measure_peak(setup).peak


CLASSIFIERS = [("fp32", "none"), ("bf16", "none"), ("fp32", "backbone")]


def classifier(precision, freeze, batch=8):
    weights = "imagenet" if freeze == "backbone" else "none"
    recipe = TrainClassify(data="x", batch=batch, precision=precision, freeze=freeze, weights=weights, average=None)
    config = find_config("efficientnet-lite0")
    return recipe, dataclasses.replace(config, preprocessing=Preprocessing(64))


@pytest.mark.parametrize(("precision", "freeze"), CLASSIFIERS)
def test_a_classifiers_memory(precision, freeze):
    device = torch.device("cpu")
    found = [classify.step_memory(*classifier(precision, freeze, batch), 20, device) for batch in (4, 12, 20, 300)]
    count = sum(p.numel() for p in build(find_config("efficientnet-lite0")).parameters())
    assert found[0].weights == pytest.approx(4 * count, rel=0.02)  # norms' statistics are weights too
    assert found[0].optimizer == pytest.approx(8 * count if freeze == "none" else 8 * 1281_000, rel=0.01)
    assert found[0].total < found[1].total < found[2].total
    assert found[3] == found[2]  # 20 pictures fill no batch of 300


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "freeze"), CLASSIFIERS)
def test_a_classifiers_real_peak(precision, freeze):
    recipe, config = classifier(precision, freeze)
    batch = {"images": torch.zeros(8, 3, 64, 64, dtype=torch.uint8), "labels": torch.zeros(8, dtype=torch.long)}
    peak = picture_step(lambda: ClassifyObjective(build(config), recipe), recipe, batch)
    assert classify.step_memory(recipe, config, 100, torch.device("cpu")).total == pytest.approx(peak, rel=0.05)


class Pictures:
    """What the memory of a step asks of a folder."""

    frequency = np.full(5, 0.2)

    def __len__(self):
        return 100


def test_crops_beyond_what_a_plan_follows(monkeypatch):
    recipe = TrainSegment(weights="none", batch=2, crop=(768, 768), average=None)
    net, device = segmenter(recipe.model.build(), 5), torch.device("cpu")
    whole = segment.step_memory(recipe, net, Pictures(), device)
    for largest in (768 * 768, 384 * 384 + 1):  # one crop at a time, and quarters of one
        monkeypatch.setattr(segment, "LARGEST", largest)
        found = segment.step_memory(recipe, net, Pictures(), device)
        assert found.weights == whole.weights
        assert found.activations == pytest.approx(whole.activations, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_segmenters_real_peak(precision):
    recipe = TrainSegment(weights="none", batch=4, crop=(64, 96), precision=precision, average=None)
    net = segmenter(recipe.model.build(), 5)
    masks = (torch.arange(4 * 64 * 96).view(4, 64, 96) // 4 % 5).to(torch.uint8)
    batch = {"images": torch.zeros(4, 3, 64, 96, dtype=torch.uint8), "masks": masks}

    def objective():  # weights that were there before do not count
        return SegmentObjective(segmenter(recipe.model.build(), 5), recipe, Pictures.frequency)

    peak = picture_step(objective, recipe, batch, at=(0, 0, 0, 0))
    planned = segment.step_memory(recipe, net, Pictures(), torch.device("cpu"))
    assert planned.total == pytest.approx(peak, rel=0.05)
