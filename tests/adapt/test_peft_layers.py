"""PEFT as the peer on every kind of layer, LoRA and DoRA: files both ways, equal outputs, equal gradients."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from volvelle import adapt
from volvelle.adapt import DoRA, LoRA
from volvelle.errors import VolvelleError
from volvelle.systems.language.load import load_language_model

pytestmark = pytest.mark.peer


class Mixed(nn.Module):
    """Tokens and an image through every kind of layer that can be adapted."""

    def __init__(self):
        super().__init__()
        pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
        self.words = nn.Embedding(11, 8, padding_idx=0)
        self.plain = nn.Linear(8, 6)
        self.turned = pytorch_utils.Conv1D(7, 6)
        self.image = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 7, 1, bias=False)
        self.grouped = nn.Conv2d(6, 7 * 2, 3, groups=2, padding=1)

    def forward(self, ids, image):
        text = self.turned(self.plain(self.words(ids)))
        seen = torch.tanh(self.image(image))
        return text.mean(1), self.point(seen).mean((2, 3)), self.grouped(seen).mean((2, 3))


NAMES = ("words", "plain", "turned", "image", "point")
KINDS = {
    "LoRA": LoRA(rank=4, alpha=6, targets=(*NAMES, "grouped")),
    "rsLoRA": LoRA(rank=4, alpha=6, rslora=True, targets=NAMES, rank_pattern={"image": 2}),
    "DoRA": DoRA(rank=4, alpha=6, targets=NAMES),
}


def build():
    torch.manual_seed(0)
    return Mixed().double()


def inputs():
    torch.manual_seed(1)
    return torch.randint(11, (3, 5)), torch.randn(3, 3, 9, 8, dtype=torch.float64)


def tuned(model, method):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapt.apply(model, method).trainable.values():
            parameter += 0.5 * torch.randn_like(parameter)
    return model


def close(got, expected):
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_ours_and_we_load_pefts(kind, tmp_path):
    peft = pytest.importorskip("peft")
    ours = tuned(build(), KINDS[kind])
    adapt.save(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").double().eval()
    close(theirs(*inputs()), ours(*inputs()))
    assert not torch.allclose(ours(*inputs())[1], build()(*inputs())[1])
    theirs.save_pretrained(tmp_path / "theirs")
    again = build()
    adapted = adapt.load(again, tmp_path / "theirs")
    close(again(*inputs()), ours(*inputs()))
    assert type(adapted.method) is type(KINDS[kind])
    assert {name: p.shape for name, p in adapted.trainable.items()} == {
        name: p.shape for name, p in adapt.adapted(ours).trainable.items()
    }


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_equal_pefts(dora, tmp_path):
    """An adapter that PEFT made, on both sides, in training mode."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=list(NAMES), use_dora=dora, init_lora_weights=False)
    theirs = peft.get_peft_model(build(), config).double().train()
    if dora:
        torch.manual_seed(4)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "magnitude" in name:
                    parameter *= 1 + 0.3 * torch.rand_like(parameter)
    theirs.save_pretrained(tmp_path)
    ours = build()
    adapt.load(ours, tmp_path)
    got, expected = ours.train()(*inputs()), theirs(*inputs())
    close(got, expected)
    for results in (got, expected):
        sum(result.square().sum() for result in results).backward()
    gradients = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            path, _, half = name.removeprefix("base_model.model.").partition(".lora_")
            key = "magnitude" if half.startswith("magnitude") else half.removeprefix("embedding_")[0].lower()
            gradients[f"{path}.adapters.default.{key}"] = parameter.grad
    trainable = adapt.adapted(ours).trainable
    assert gradients.keys() == trainable.keys()
    for name, parameter in trainable.items():
        torch.testing.assert_close(parameter.grad, gradients[name].view_as(parameter), rtol=1e-6, atol=1e-9)


def test_a_grouped_convolution_that_mixes_groups_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(build(), peft.LoraConfig(r=4, target_modules=["grouped"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(VolvelleError, match="grouped is a convolution of 2 groups, and this adapter's A mixes them"):
        adapt.load(build(), tmp_path)


def test_layers_of_another_base_are_named(tmp_path):
    adapt.save(tuned(build(), KINDS["DoRA"]), tmp_path)
    other = build()
    other.image = nn.Conv2d(3, 5, 3)
    other.words = nn.Embedding(12, 8)
    other.plain = nn.ReLU()
    with pytest.raises(VolvelleError, match="belongs to another base model") as error:
        adapt.load(other, tmp_path)
    said = str(error.value)
    assert "image (adapter 6 x 27, model 5 x 27)" in said
    assert "words (adapter 8 x 11, model 8 x 12)" in said
    assert "plain (a ReLU has no weight" in said
    assert not any(".adapters." in name for name, _ in other.named_parameters())


def test_a_file_without_magnitudes_is_no_dora(tmp_path):
    adapt.save(tuned(build(), KINDS["DoRA"]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    kept = {name: t for name, t in load_file(path).items() if "plain.lora_magnitude" not in name}
    save_file(kept, path)
    with pytest.raises(VolvelleError, match=r"not a DoRA .*plain \(only lora_A and lora_B\)"):
        adapt.load(build(), tmp_path)


def test_the_base_weights_that_peft_adds_for_embeddings_are_checked(tiny_llama, ids, tmp_path):
    """PEFT writes targeted embeddings whole beside their adapters."""
    peft = pytest.importorskip("peft")
    model = tiny_llama(tie_word_embeddings=False)
    config = peft.LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert any(name.endswith("base_layer.weight") for name in names), "else this test shows nothing"
    ours = tiny_llama(tie_word_embeddings=False)
    adapt.load(ours, tmp_path)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-6)
    other = tiny_llama(tie_word_embeddings=False)
    with torch.no_grad():
        other.model.embed_tokens.weight[3] += 1
    with pytest.raises(VolvelleError, match=r"model.embed_tokens \(the file's embeddings differ from the model's\)"):
        adapt.load(other, tmp_path)


def test_embeddings_that_peft_adapted_reach_our_decoder_under_its_own_names(ids, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "tie_word_embeddings": False}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, **sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules=["wte", "c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert any(name.endswith("base_layer.weight") for name in load_file(tmp_path / "adapter/adapter_model.safetensors"))
    ours = load_language_model(tmp_path / "base")
    adapt.load(ours, tmp_path / "adapter")
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_of_our_decoder_and_of_transformers(family, ids, tmp_path):
    """In GPT-2's files q, k and v are one layer: adapted in part, the rest keeps the norm it has."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).eval()
    else:
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, **sizes)).eval()
    theirs.save_pretrained(tmp_path / "base")
    ours = load_language_model(tmp_path / "base")
    tuned(ours, DoRA(rank=3, alpha=5, targets=("q_proj", "v_proj", "down_proj")))
    adapt.save(ours, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["use_dora"] is True
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)
    fresh = load_language_model(tmp_path / "base")
    adapt.load(fresh, tmp_path / "adapter")
    torch.testing.assert_close(fresh(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)
    adapt.merge(ours)
    torch.testing.assert_close(fresh(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)
