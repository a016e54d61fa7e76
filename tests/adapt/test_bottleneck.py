"""Where bottleneck adapters go in each family, what they compute there, and their file format."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from volvelle import adapt
from volvelle.adapt import Bottleneck
from volvelle.errors import VolvelleError

SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "Llama": ({"hidden_size": 16, "intermediate_size": 24}, ["self_attn.o_proj", "mlp.down_proj"], "mlp"),
    "GPT2": ({"n_embd": 16, "n_head": 4, "n_layer": 2}, ["attn.c_proj", "mlp.c_proj"], "mlp"),
    "GPTNeoX": ({"hidden_size": 16, "intermediate_size": 24}, ["attention.dense", "mlp.dense_4h_to_h"], "mlp"),
    "OPT": ({"hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 16}, ["self_attn.out_proj", "fc2"], None),
    "Bert": ({"hidden_size": 16, "intermediate_size": 24}, ["attention.output.dense", "output.dense"], None),
    "Roberta": ({"hidden_size": 16, "intermediate_size": 24}, ["attention.output.dense", "output.dense"], None),
    "DistilBert": (
        {"dim": 16, "hidden_dim": 24, "n_heads": 4, "n_layers": 2}, ["attention.out_lin", "ffn.lin2"], "ffn"
    ),
    "Bart": (
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4},
        ["self_attn.out_proj", "encoder_attn.out_proj", "fc2"], None,
    ),
    "T5": (
        {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4},
        ["SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"], "DenseReluDense",
    ),
}  # fmt: skip
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1]])


def build(family):
    transformers = pytest.importorskip("transformers")
    sizes, ends, module = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**{**SIZES, **sizes}))
    # Frozen from the start: T5's attention takes another kernel, and rounds otherwise, where its bias has a gradient.
    return model.eval().requires_grad_(False), ends, module


def run(model):
    inputs = {"decoder_input_ids": IDS[:, :3]} if model.config.is_encoder_decoder else {}
    return model(IDS, **inputs).last_hidden_state


def hosts(model):
    return sorted({name.partition(".adapters.")[0] for name, _ in model.named_parameters() if ".adapters." in name})


@pytest.mark.peer
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["houlsby", "pfeiffer", "parallel"])
def test_the_sublayers_of_a_family_are_found(family, form):
    model, ends, module = build(family)
    before = run(model)
    if form == "parallel" and module is None:
        with pytest.raises(VolvelleError, match="has no module that is its whole feed-forward network"):
            adapt.apply(model, Bottleneck(form=form))
        return
    adapted = adapt.apply(model, Bottleneck(form=form, width=3))
    feed, attention = ends[-1], ends[:-1]
    paths = [path for path, _ in model.named_modules() if ".adapters" not in path]
    of_attention = {path for path in paths for end in attention if path.endswith("." + end)}
    of_feeding = {path for path in paths if path.endswith("." + feed)} - of_attention
    beside = {path for path in paths if path.endswith(f".{module}")}
    assert set(hosts(model)) == {"houlsby": of_attention | of_feeding, "pfeiffer": of_feeding, "parallel": beside}[form]
    assert len(hosts(model)) >= 2
    assert torch.equal(run(model), before)
    for parameter in adapted.trainable.values():
        nn.init.normal_(parameter, std=0.5)
    assert not torch.allclose(run(model), before, atol=1e-3)
    run(model).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(adapted.trainable)
    adapt.remove(model)
    assert torch.equal(run(model), before)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, *, hidden):
        return self.fc2(torch.relu(self.fc1(hidden))), "weights"


@pytest.mark.parametrize("form", ["pfeiffer", "parallel"])
def test_what_is_added_where(form):
    """Behind fc2: a function of its result. Beside the block: of the block's own input, added to its first result."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": Block()}).double()
    x = torch.randn(2, 6, dtype=torch.float64)
    plain = model["mlp"](hidden=x)[0]
    target = "mlp.fc2" if form == "pfeiffer" else "mlp"
    adapted = adapt.apply(model, Bottleneck(form=form, width=2, scale=3.0, targets=(target,)))
    weights = [nn.init.normal_(parameter).detach() for parameter in adapted.trainable.values()]
    down, down_bias, up, up_bias = weights
    source = plain if form == "pfeiffer" else x
    expected = plain + 3.0 * (torch.relu(source @ down.T + down_bias) @ up.T + up_bias)
    got, other = model["mlp"](hidden=x)
    torch.testing.assert_close(got, expected)
    assert other == "weights"


def test_families_that_are_not_known_say_what_to_do():
    model = nn.ModuleDict({"mlp": Block()})
    with pytest.raises(VolvelleError, match="ModuleDict names its attention and feed-forward layers as no family"):
        adapt.apply(model, Bottleneck())
    with pytest.raises(VolvelleError, match="cannot adapt mlp: a Block is no linear layer"):
        adapt.apply(model, Bottleneck(targets=("mlp",)))
    with pytest.raises(VolvelleError, match="'fc3' does not exist"):
        adapt.apply(model, Bottleneck(targets=("fc3",)))
    assert type(model["mlp"]) is Block


def saved(folder, width=6):
    torch.manual_seed(0)
    model = nn.ModuleDict({"o_proj": nn.Linear(4, width), "head": nn.Linear(width, 3)})
    method = Bottleneck(width=2, targets=("o_proj",), activation="silu", scale=0.5)
    for parameter in adapt.apply(model, method).trainable.values():
        nn.init.normal_(parameter)
    adapt.save(model, folder, base="org/base")
    return model


def test_the_format_is_the_documented_one(tmp_path):
    saved(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings == {
        "peft_type": "VOLVELLE_BOTTLENECK", "format": 1, "base_model_name_or_path": "org/base", "form": "houlsby",
        "width": 2, "reduction": 16, "activation": "silu", "scale": 0.5, "dropout": 0.0, "targets": ["o_proj"],
        "exclude": [], "layers": None,
    }  # fmt: skip
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "o_proj.down": (2, 6), "o_proj.down_bias": (2,), "o_proj.up": (6, 2), "o_proj.up_bias": (6,)
    }  # fmt: skip


def test_another_base_and_broken_files_are_refused_by_name(tmp_path):
    saved(tmp_path)
    with pytest.raises(VolvelleError, match=r"another base model: o_proj \(adapter 6 wide, model 7\)") as error:
        adapt.load(nn.ModuleDict({"o_proj": nn.Linear(4, 7)}), tmp_path)
    assert error.value.tip == "it was made for org/base"
    with pytest.raises(VolvelleError, match=r"o_proj \(the model has no such layer\)"):
        adapt.load(nn.ModuleDict({"out": nn.Linear(4, 6)}), tmp_path)
    with pytest.raises(VolvelleError, match=r"head.weight \(adapter's base \(3, 6\), model \(5, 6\)\)"):
        adapt.load(nn.ModuleDict({"o_proj": nn.Linear(4, 6), "head": nn.Linear(6, 5)}), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if name != "o_proj.up"}, path)
    with pytest.raises(VolvelleError, match="not bottleneck adapters: o_proj"):
        adapt.load(nn.ModuleDict({"o_proj": nn.Linear(4, 6)}), tmp_path)
    config = tmp_path / "adapter_config.json"
    settings = json.loads(config.read_text())
    for change, message in (
        ({"format": 2}, "format 2 is not known"),
        ({"gate": True}, "not supported: gate"),
        ({"width": 0}, "width must be at least 1"),
    ):
        config.write_text(json.dumps(settings | change))
        with pytest.raises(VolvelleError, match=message):
            adapt.load(nn.ModuleDict({"o_proj": nn.Linear(4, 6)}), tmp_path)


@pytest.mark.peer
def test_peft_refuses_it_by_name(tmp_path):
    peft = pytest.importorskip("peft")
    saved(tmp_path)
    with pytest.raises(Exception, match="VOLVELLE_BOTTLENECK"):
        peft.PeftConfig.from_pretrained(tmp_path)
