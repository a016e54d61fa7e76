"""Adapter files: PEFT reads ours, we read PEFT's, and damaged or foreign ones are refused by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from volvelle import adapt
from volvelle.adapt import LoRA
from volvelle.errors import VolvelleError


def tuned(model, method=None):
    adapted = adapt.apply(model, method or LoRA(rank=4))
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in adapted.trainable.values():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def plain(width=8):
    torch.manual_seed(0)
    return nn.ModuleDict({"q_proj": nn.Linear(8, width), "v_proj": nn.Linear(8, width, bias=False)})


def test_round_trip_is_bit_exact(tmp_path):
    model = tuned(plain(), LoRA(rank=3, alpha=5.5, dropout=0.1, rank_pattern={"v_proj": 2}))
    adapt.save(model, tmp_path, base="org/base")
    other = plain()
    adapted = adapt.load(other, tmp_path)
    assert adapted.method == LoRA(rank=3, alpha=5.5, dropout=0.1, rank_pattern={"v_proj": 2})
    for (name, ours), (also, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert name == also
        assert torch.equal(ours, theirs)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert sorted(load_file(tmp_path / "adapter_model.safetensors")) == [
        f"base_model.model.{path}.lora_{half}.weight" for path in ("q_proj", "v_proj") for half in "AB"
    ]


def test_adapters_of_half_precision_models_stay_fp32(tmp_path):
    model = tuned(plain().bfloat16())
    adapt.save(model, tmp_path)
    other = plain().bfloat16()
    adapt.load(other, tmp_path)
    ours, theirs = (net["q_proj"].adapters["default"] for net in (other, model))
    assert ours.a.dtype == torch.float32
    assert torch.equal(ours.b, theirs.b)


def test_another_base_is_refused_by_layer(tmp_path):
    adapt.save(tuned(plain()), tmp_path, base="org/base")
    wrong = plain(width=9)
    with pytest.raises(
        VolvelleError, match=r"another base model: q_proj \(adapter 8 x 8, model 9 x 8\), v_proj"
    ) as error:
        adapt.load(wrong, tmp_path)
    assert error.value.tip == "it was made for org/base"
    assert type(wrong["q_proj"]) is nn.Linear
    wrong = nn.ModuleDict({"query": nn.Linear(8, 8)})
    with pytest.raises(VolvelleError, match=r"q_proj \(the model has no such layer\)"):
        adapt.load(wrong, tmp_path)


def stack(blocks):
    """Blocks of the same shapes, and as many of them as is asked for."""
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList(plain() for _ in range(blocks)), "head": nn.Linear(8, 8)})


METHODS = {
    "LoRA": LoRA(rank=2),
    "LoRA of the first block": LoRA(rank=2, layers=(0,)),
    "bottleneck": adapt.Bottleneck(targets=("q_proj",), layers=(0,)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("made_for", "given"), [(2, 4), (4, 2)])
def test_more_or_fewer_layers_are_refused_by_name(tmp_path, method, made_for, given):
    adapt.save(tuned(stack(made_for), METHODS[method]), tmp_path, base="org/base")
    wrong = stack(given)
    with pytest.raises(VolvelleError, match="belongs to another base model") as error:
        adapt.load(wrong, tmp_path)
    side = "the adapter's base" if given > made_for else "the model"
    one = re.search(r"layers\.2(\.q_proj)? \((.*?) has no such layer", str(error.value))
    assert one is not None, error.value
    assert one[2] == side
    assert "layers.1" not in str(error.value)
    assert error.value.tip == "it was made for org/base"
    assert adapt.adapted(wrong) is None
    adapt.load(stack(made_for), tmp_path)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, False),
        ({"target_modules": "layers.*q_proj"}, False),
        ({"layers_to_transform": [0, 1]}, True),
        ({"target_modules": "layers.[01].q_proj"}, True),
        ({"target_modules": ["layers.0.q_proj", "layers.1.q_proj"]}, True),
        ({"exclude_modules": r"layers.[23]\..*"}, True),
        ({"layers_to_transform": [0, 1, 2]}, False),
    ],
)
def test_a_file_that_does_not_describe_its_base_is_refused_by_what_it_chooses(tmp_path, changes, fits):
    adapt.save(tuned(stack(2), LoRA(rank=2, targets=("q_proj",))), tmp_path)
    weights, path = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(load_file(weights), weights)  # as PEFT writes it, without our metadata
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if fits:
        adapt.load(stack(4), tmp_path)
        return
    wrong = stack(4)
    with pytest.raises(VolvelleError, match=r"layers\.2 \(the adapter's base has no such layer\)"):
        adapt.load(wrong, tmp_path)
    assert adapt.adapted(wrong) is None


def test_another_base_is_refused_where_the_adapted_layers_fit(tmp_path):
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "head": nn.Linear(8, 30)})
    adapt.save(tuned(model, LoRA(targets=("q_proj",))), tmp_path)
    other = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "head": nn.Linear(8, 31)})
    with pytest.raises(VolvelleError, match=r"head.bias \(adapter's base \(30,\), model \(31,\)\)"):
        adapt.load(other, tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("bias", "all"), ("modules_to_save", ["lm_head"]), ("init_lora_weights", "pissa"), ("new", 3)],
)
def test_what_is_not_supported_is_named(tmp_path, field, value):
    adapt.save(tuned(plain()), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(VolvelleError, match=f"not supported: {field}="):
        adapt.load(plain(), tmp_path)


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(VolvelleError, match=r"adapter_config.json: no such file"):
        adapt.load(plain(), tmp_path)
    adapt.save(tuned(plain()), tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(VolvelleError, match=r"adapter_model.safetensors: truncated or damaged"):
        adapt.load(plain(), tmp_path)
    weights.unlink()
    with pytest.raises(VolvelleError, match=r"adapter_model.safetensors: no such file"):
        adapt.load(plain(), tmp_path)
    weights.write_bytes(content)
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "r": 9}))
    with pytest.raises(VolvelleError, match=r"q_proj has rank 4, but adapter_config.json says 9"):
        adapt.load(plain(), tmp_path)
    config.write_text(json.dumps({**settings, "peft_type": "IA3"}))
    with pytest.raises(VolvelleError, match="peft_type IA3 is not supported; supported: LORA"):
        adapt.load(plain(), tmp_path)
    config.write_text("{")
    with pytest.raises(VolvelleError, match="not valid JSON"):
        adapt.load(plain(), tmp_path)
    config.write_text(json.dumps({k: v for k, v in settings.items() if k != "r"}))
    with pytest.raises(VolvelleError, match=r"adapter_config.json: 'r' is missing"):
        adapt.load(plain(), tmp_path)


def test_both_files_have_ordinary_permissions(tmp_path):
    adapt.save(tuned(plain()), tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_half_a_pair_is_named(tmp_path):
    adapt.save(tuned(plain()), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.q_proj.lora_B.weight"]
    tensors["base_model.model.v_proj.lora_magnitude_vector"] = torch.ones(8)
    save_file(tensors, path)
    with pytest.raises(VolvelleError, match=r"not a LoRA .*v_proj.lora_magnitude_vector, q_proj \(only lora_A\)"):
        adapt.load(plain(), tmp_path)


def test_a_full_disk_leaves_the_previous_adapter(tmp_path, monkeypatch):
    model = tuned(plain())
    adapt.save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    nn.init.ones_(model["q_proj"].adapters["default"].b)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(VolvelleError, match="No space left on device"):
            adapt.save(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)  # the second file of the two
        with pytest.raises(VolvelleError, match="No space left on device"):
            adapt.save(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    adapt.save(model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]


@pytest.mark.peer
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
def test_peft_loads_ours(tiny_llama, ids, tmp_path, rslora, targets):
    peft = pytest.importorskip("peft")
    method = LoRA(rank=4, alpha=6, rslora=rslora, targets=targets, layers=(1,))
    model = tuned(tiny_llama(), method).eval()
    adapt.save(model, tmp_path, base="tiny")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    assert theirs.peft_config["default"].base_model_name_or_path == "tiny"


@pytest.mark.peer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_we_load_pefts(tiny_llama, ids, tmp_path, dtype):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=3, target_modules=["q_proj", "down_proj"], rank_pattern={r"0\.self_attn\.q_proj": 2},
        alpha_pattern={"down_proj": 7}, init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(tiny_llama(dtype), config).eval()
    theirs.save_pretrained(tmp_path)
    model = tiny_llama(dtype)
    adapt.load(model, tmp_path)
    torch.testing.assert_close(model.eval()(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-6)
    again = tmp_path / "again"
    adapt.save(model, again)
    ours, original = load_file(again / "adapter_model.safetensors"), load_file(tmp_path / "adapter_model.safetensors")
    assert ours.keys() == original.keys()
    assert all(torch.equal(ours[name], original[name]) for name in ours)
    shutil.rmtree(again)


@pytest.mark.peer
def test_gpt2_of_transformers_both_ways(ids, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

    def build():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
        ).eval()

    model = build()
    before = model(ids).logits
    adapt.apply(model, LoRA(rank=3, targets=("c_attn", "mlp.c_proj")))
    assert torch.equal(model.eval()(ids).logits, before)
    adapt.remove(model)
    tuned(model, LoRA(rank=3, targets=("c_attn", "mlp.c_proj")))
    adapt.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    other = build()
    adapt.load(other, tmp_path / "theirs")
    assert torch.equal(other(ids).logits, model(ids).logits)
    adapt.merge(other)
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert "Conv1D" in type(other.transformer.h[0].attn.c_attn).__name__


FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 32,
    }),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "roformer": ("RoFormerForCausalLM", "RoFormerConfig", {
        "hidden_size": 16, "embedding_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 32, "is_decoder": True,
    }),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def twins(request, tmp_path):
    """A random transformers model, and our Decoder with the same weights."""
    transformers = pytest.importorskip("transformers")
    from volvelle.systems.language.load import load_language_model

    model_class, config_class, sizes = FAMILIES[request.param]
    torch.manual_seed(0)
    theirs = getattr(transformers, model_class)(getattr(transformers, config_class)(vocab_size=64, **sizes)).eval()
    theirs.save_pretrained(tmp_path / "base")
    return theirs, load_language_model(tmp_path / "base")


@pytest.mark.peer
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear", ("k_proj", "down_proj")])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_adapters_of_our_decoder(twins, ids, tmp_path, targets, rslora):
    peft = pytest.importorskip("peft")
    theirs, ours = twins
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    method = LoRA(
        rank=3,
        alpha=5,
        targets=targets,
        rslora=rslora,
        alpha_pattern={"v_proj": 9},
        rank_pattern={r"1\.self_attn\.q_proj": 2},
    )
    base = ours(ids).logits
    tuned(ours, method)
    adapt.save(ours, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base, ours(ids).logits, atol=1e-3)
    # and back again: what PEFT wrote, on a fresh Decoder
    loaded.save_pretrained(tmp_path / "theirs")
    expected = ours(ids).logits
    adapt.remove(ours)
    assert torch.equal(ours(ids).logits, base)
    adapt.load(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=1e-5)
    adapt.save(ours, tmp_path / "again")
    adapt.remove(ours)
    adapt.load(ours, tmp_path / "again")
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=1e-5)
    adapt.merge(ours)
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.peer
def test_our_decoder_loads_what_peft_trained(twins, ids, tmp_path):
    peft = pytest.importorskip("peft")
    theirs, ours = twins
    conv1d = type(theirs).__name__.startswith("GPT2")
    names = (
        ["c_attn"] if conv1d else ["query", "value"] if "RoFormer" in type(theirs).__name__ else ["q_proj", "v_proj"]
    )
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, init_lora_weights=False, fan_in_fan_out=conv1d)
    tuned_theirs = peft.get_peft_model(theirs, config).eval()
    tuned_theirs.save_pretrained(tmp_path / "adapter")
    adapted = adapt.load(ours, tmp_path / "adapter")
    torch.testing.assert_close(ours(ids).logits, tuned_theirs(ids).logits, rtol=1e-4, atol=1e-5)
    assert {name.split(".")[-4] for name in adapted.trainable} <= {"q_proj", "k_proj", "v_proj"}


@pytest.mark.peer
def test_an_adapter_of_another_family_is_refused(twins, tmp_path, tiny_llama):
    _, ours = twins
    adapt.save(tuned(ours), tmp_path / "adapter")
    with pytest.raises(VolvelleError, match="this adapter belongs to another base model"):
        adapt.load(tiny_llama(hidden_size=32, intermediate_size=32), tmp_path / "adapter")
