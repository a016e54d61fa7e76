"""Files of prefixes and prompts: PEFT reads ours, we read PEFT's, on its models and on our decoders."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapt.prefix_models import decoder, gpt2, llama, shake

from volvelle import adapt
from volvelle.adapt.prefix_methods import PrefixTuning, PromptTuning
from volvelle.errors import VolvelleError
from volvelle.systems.language.huggingface import read_folder

IDS = torch.arange(14).view(2, 7) * 5 % 37
METHODS = {"prefix": PrefixTuning(3, hidden=6), "prompt": PromptTuning(3)}
MODELS = {"llama": llama, "gpt2": gpt2}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_round_trip(tmp_path, kind, dtype):
    model = decoder(dtype=dtype)
    shake(adapt.apply(model, METHODS[kind]))
    expected = model(IDS).logits
    adapt.save(model, tmp_path, base="org/base")
    other = decoder(dtype=dtype)
    adapted = adapt.load(other, tmp_path)
    assert torch.equal(other(IDS).logits, expected)
    assert adapted.method.length == 3
    assert [p.dtype for p in adapted.trainable.values()] == [torch.float64 if dtype == torch.float64 else torch.float32]
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: x.shape for key, x in stored.items()} == {
        "prompt_embeddings": (3, 2 * 2 * 2 * 4 if kind == "prefix" else 16)
    }
    adapt.save(other, tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again" / "adapter_model.safetensors")["prompt_embeddings"],
                       stored["prompt_embeddings"])  # fmt: skip
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"


@pytest.mark.peer
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_peft_reads_ours(tmp_path, kind, name):
    peft = pytest.importorskip("peft")
    MODELS[name]().save_pretrained(tmp_path / "base")
    for number, ours in enumerate((MODELS[name](), read_folder(tmp_path / "base"))):
        folder = tmp_path / str(number)
        shake(adapt.apply(ours, METHODS[kind]))
        adapt.save(ours, folder)
        theirs = peft.PeftModel.from_pretrained(MODELS[name](), folder).eval()
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits[:, -7:], rtol=1e-5, atol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["PrefixTuning", "PrefixTuning-mlp", "PromptTuning"])
@torch.no_grad()
def test_we_read_pefts(tmp_path, name, kind):
    peft = pytest.importorskip("peft")
    MODELS[name]().save_pretrained(tmp_path / "base")
    options = {"prefix_projection": True, "encoder_hidden_size": 5} if kind.endswith("mlp") else {}
    config = getattr(peft, f"{kind.removesuffix('-mlp')}Config")
    theirs = peft.get_peft_model(MODELS[name](), config(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs(IDS).logits[:, -7:]
    for ours in (MODELS[name](), read_folder(tmp_path / "base")):
        adapt.load(ours, tmp_path / "adapter")
        torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", METHODS)
def test_another_base_is_refused(tmp_path, kind):
    model = decoder()
    adapt.apply(model, METHODS[kind])
    adapt.save(model, tmp_path, base="org/base")
    wrong = decoder(depth=3)
    keys = list(wrong.state_dict())
    if kind == "prefix":
        match = r"prompt_embeddings \(adapter 32 features a row, model 48: 2 x 3 layers x 2 heads x 4\)"
        with pytest.raises(VolvelleError, match=match) as error:
            adapt.load(wrong, tmp_path)
        assert error.value.tip == "it was made for org/base"
    else:
        with pytest.raises(VolvelleError, match=r"model\.layers\.2 \(the adapter's base has no such layer\)"):
            adapt.load(wrong, tmp_path)
    narrow = decoder(mlp=type(model.config.mlp)(20))
    with pytest.raises(VolvelleError, match=r"another base model: model.layers.0.mlp.down_proj.weight"):
        adapt.load(narrow, tmp_path)
    assert list(wrong.state_dict()) == keys
    assert wrong.before is None


def test_what_is_not_supported_is_named(tmp_path):
    model = decoder()
    adapt.apply(model, METHODS["prefix"])
    adapt.save(model, tmp_path)
    path, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    settings = json.loads(path.read_text())

    def refused(match, **changes):
        path.write_text(json.dumps({key: x for key, x in (settings | changes).items() if x != "gone"}))
        with pytest.raises(VolvelleError, match=match):
            adapt.load(decoder(), tmp_path)

    refused("not supported: modules_to_save=", modules_to_save=["lm_head"])
    refused("not supported: num_transformer_submodules=3", num_transformer_submodules=3)
    refused("not supported: new=3", new=3)
    refused("3 rows, but num_virtual_tokens is 4", num_virtual_tokens=4)
    refused("'num_virtual_tokens' is missing", num_virtual_tokens="gone")
    refused("length must be at least 1", num_virtual_tokens=0)
    save_file({"other": torch.zeros(2)}, weights)
    refused(r"expected one matrix prompt_embeddings, found other \(2,\)")
