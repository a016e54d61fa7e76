"""Configurations by name, folder, file and run; the published counts; plans of language models from them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from volvelle.adapt.methods import LoRA
from volvelle.errors import UsageError, VolvelleError
from volvelle.inspect.memory_models import KNOWN, find_config
from volvelle.runs import RunFolder
from volvelle.systems.language.config import GatedMLP
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.huggingface_config import config_to_dict
from volvelle.systems.language.models import build
from volvelle.train import estimate
from volvelle.train.estimate import estimate_memory, plan_language, whole_windows
from volvelle.train.language import completion_loss

SIZES = {"vocabulary": 1000, "width": 72, "embedding_width": 72, "head_width": 8, "mlp": GatedMLP(192)}
SMALL = dataclasses.replace(KNOWN["smollm2-135m"].config, depth=2, **SIZES)
DEEP = dataclasses.replace(SMALL, depth=12)


@pytest.mark.parametrize("name", KNOWN)
def test_published_parameter_counts(name):
    known = KNOWN[name]
    with torch.device("meta"):
        model = build(known.config)
    assert sum(p.numel() for p in model.parameters()) == known.parameters


def test_a_configuration_is_found_wherever_it_lies(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_dict(SMALL)))
    for name in (folder, folder / "config.json"):
        assert find_config(str(name)).config == SMALL
    assert find_config("Qwen/Qwen1.5-72B").config is KNOWN["qwen1.5-72b"].config
    assert find_config("smollm2").config is KNOWN["smollm2-135m"].config
    run = RunFolder.create(root=tmp_path / "runs", kind="adapt", config={"model": str(folder)})
    assert find_config(str(run.path)).config == SMALL
    assert str(folder) in find_config(str(run.path)).source
    (run.path / "weights" / "config.json").write_text(json.dumps(config_to_dict(DEEP)))
    assert find_config(str(run.path)).config == DEEP


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UsageError) as caught:
        find_config("qwen1.5-27b")
    assert "qwen1.5-7b" in str(caught.value.tip)
    with pytest.raises(VolvelleError, match=r"no config\.json, run or GGUF file"):
        find_config(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(VolvelleError, match="not a JSON object but a list"):
        find_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(VolvelleError, match="not valid JSON"):
        find_config(str(tmp_path))


METHODS = {
    "full": {},
    "amp": {"autocast": True},
    "checkpointing": {"checkpointing": True},
    "lora": {"method": LoRA(), "autocast": True, "stored": torch.bfloat16},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_deep_model_is_the_continuation_of_shallow_ones(name, monkeypatch):
    batch = whole_windows(48)(3)
    quick = estimate_memory(DEEP, batch, **METHODS[name])
    monkeypatch.setattr(estimate, "SHALLOW", 100)
    whole = estimate_memory(DEEP, batch, **METHODS[name])
    assert quick.total == pytest.approx(whole.total, rel=0.002)
    assert quick.weights == whole.weights
    assert quick.total > 1.2 * estimate_memory(SMALL, batch, **METHODS[name]).total


def test_a_few_chunks_of_the_loss_stand_for_all(monkeypatch):
    monkeypatch.setattr(estimate, "chunk_rows", lambda vocabulary: 16)
    monkeypatch.setattr("volvelle.train.losses.chunk_rows", lambda vocabulary: 16)
    first = plan_language(SMALL, whole_windows(64)(3))
    monkeypatch.setattr(estimate, "_loss", lambda model, batch: completion_loss(model, batch).value)
    assert plan_language(SMALL, whole_windows(64)(3)).peak == first.peak


@pytest.mark.parametrize("method", ["full", "lora", "adapter", "prefix"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_method_plans_our_decoder(method, checkpointing):
    plan = plan_language(SMALL, whole_windows(32), size=2, method=method, checkpointing=checkpointing)
    total = sum(p.numel() for p in Decoder(SMALL).parameters())
    assert plan.trainable == total if method == "full" else plan.trainable < 0.3 * total
    assert plan.composition["weights"] == 4 * plan.parameters
    assert plan.composition["optimiser"] >= 8 * plan.trainable


def test_prefix_trains_keys_and_values_of_every_layer():
    plan = plan_language(SMALL, whole_windows(32), size=2, method="prefix")
    assert plan.trainable == 2 * SMALL.depth * SMALL.kv_heads * 20 * SMALL.head_width


def test_sharding_under_autocast_gathers_whole_weights():
    config = dataclasses.replace(DEEP, width=288, embedding_width=288, head_width=32, vocabulary=100)
    options = {"size": 1, "precision": "amp", "gpus": "8x1"}
    ddp, fsdp = (plan_language(config, whole_windows(8), shard=shard, **options).card for shard in ("ddp", "fsdp"))
    assert ddp is not None
    assert fsdp is not None
    parameters = plan_language(config, whole_windows(8)(1)).parameters
    # ddp: weights, gradients, Adam and buckets, 20 bytes a parameter; fsdp: an eighth of the first three, autocast's
    # casts, and what is whole in fp32: weights of the root and of two blocks, and a buffer of one block's gradients.
    assert ddp.peak > 20 * parameters
    embedding, norm = config.vocabulary * config.width, config.width
    block = (parameters - embedding - norm) // config.depth
    gathered = 4 * (embedding + norm) + 2 * 4 * block + 4 * block
    assert fsdp.communication == gathered
    growing = ddp.peak - 20 * parameters
    assert fsdp.peak < 16 * parameters / 8 + 2 * parameters + gathered + 4 * block + 4 * embedding + growing
