"""Opening runs: an adapter on its base, merged or not; plain weights; and what is missing, said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from volvelle import adapt
from volvelle.adapt import LoRA
from volvelle.decode import generate
from volvelle.errors import VolvelleError
from volvelle.runs import RunFolder
from volvelle.systems.language.config import GatedMLP, LanguageConfig, RMSNorm, Rope
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.huggingface import write_folder


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    config = LanguageConfig(
        "llama", vocabulary=64, width=16, depth=2, heads=4, context=32, norm=RMSNorm(), mlp=GatedMLP(24),
        position=Rope(), kv_heads=2, init_std=0.3,
    )  # fmt: skip
    write_folder(Decoder(config), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def run(base, tmp_path):
    """An adapt run, and the logits its model had."""
    run = RunFolder.create(root=tmp_path / "runs", kind="adapt", config={"model": str(base), "method": "lora"})
    model = adapt.load_run(base)
    adapt.apply(model, LoRA(rank=2))
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            nn.init.normal_(parameter, std=0.5)
    adapt.save(model, run.path / "adapter", base=str(base))
    return run, model


def test_a_run_with_an_adapter(run, ids):
    folder, model = run
    for path in (folder.path, str(folder.path), folder.path / "adapter"):
        opened = adapt.load_run(path)
        assert torch.equal(opened(ids).logits, model(ids).logits)
        assert list(opened.model.layers[0].self_attn.q_proj.adapters) == ["default"]
    merged = adapt.load_run(folder.path, merged=True)
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert adapt.adapted(merged) is None


def test_half_precision_runs(run, ids):
    folder, model = run
    opened, merged = (adapt.load_run(folder.path, dtype=torch.bfloat16, merged=flag) for flag in (False, True))
    assert opened.dtype == merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged(ids).logits.float(), model(ids).logits, rtol=0.2, atol=0.4)
    weight = merged.model.layers[0].self_attn.q_proj.weight
    adapt.merge(model)
    assert torch.equal(weight, model.model.layers[0].self_attn.q_proj.weight.bfloat16()), "rounded once, after the sum"


def test_generating_with_an_adapter_equals_merged(run):
    folder, _ = run
    opened = adapt.load_run(folder.path, dtype=torch.float64)
    merged = adapt.load_run(folder.path, dtype=torch.float64, merged=True)
    plain = adapt.load_run(folder.manifest["base_model"], dtype=torch.float64)
    answers = [generate(model, [3, 1, 4], max_tokens=20).tokens for model in (opened, merged, plain)]
    assert answers[0] == answers[1] != answers[2]


def test_a_run_with_weights(base, tmp_path, ids):
    run = RunFolder.create(root=tmp_path / "runs", kind="train", config={})
    model = adapt.load_run(base)
    write_folder(model, run.path / "weights")
    assert torch.equal(adapt.load_run(run.path)(ids).logits, model(ids).logits)


def test_a_run_with_nothing(tmp_path):
    run = RunFolder.create(root=tmp_path, kind="train", config={})
    with pytest.raises(VolvelleError, match="holds neither an adapter nor weights"):
        adapt.load_run(run.path)


def test_an_adapter_without_a_base_says_so(run, tmp_path):
    _, model = run
    adapt.save(model, tmp_path / "alone")
    with pytest.raises(VolvelleError, match="does not say which base model"):
        adapt.load_run(tmp_path / "alone")
