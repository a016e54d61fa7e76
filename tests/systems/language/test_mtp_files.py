"""Modules of multi-token prediction in files: DeepSeek-V3's names, a folder of their own, and one folder for both."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.systems.language.test_decoder import GPT2, LLAMA, build, some_ids
from tests.systems.language.test_mtp import pair

from volvelle.errors import VolvelleError
from volvelle.parts.quantization.weight_only import WeightOnlyLinear
from volvelle.systems.language.config import GatedMLP
from volvelle.systems.language.huggingface import read_folder, write_folder
from volvelle.systems.language.mtp import KINDS
from volvelle.systems.language.mtp_files import read_mtp, write_mtp
from volvelle.systems.language.quantized import quantize_model
from volvelle.train.scratch import POSITIONS


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def made(kind="sequential", config=LLAMA, depths=2):
    model, mtp = pair(kind, config, depths)
    return model.float(), mtp.float()


SHAW = dataclasses.replace(LLAMA, family="volvelle", position=POSITIONS["shaw"])


@pytest.mark.parametrize("config", [LLAMA, GPT2, SHAW], ids=lambda config: config.family)
@pytest.mark.parametrize("kind", KINDS)
def test_written_and_read_they_are_the_same_bits(kind, config, tmp_path):
    model, mtp = made(kind, config)
    write_folder(model, tmp_path / "weights")
    write_mtp(mtp, model, tmp_path / "mtp")
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = read_folder(tmp_path / "weights")
    again = read_mtp(tmp_path / "mtp", plain)
    assert same(plain, model)
    assert same(again, mtp)
    assert (type(again), again.depths, again.training) == (type(mtp), 2, False)
    assert torch.equal(torch.random.get_rng_state(), state), "reading draws nothing"
    small = read_mtp(tmp_path / "mtp", plain.bfloat16())
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


def test_names_are_deepseeks(tmp_path):
    """README_WEIGHTS.md of DeepSeek-V3: one layer more, with the norms, the projection and a whole block."""
    model, mtp = made(depths=1)
    write_mtp(mtp, model, tmp_path)
    inside = ["enorm", "hnorm", "eh_proj", "shared_head.norm", "input_layernorm", "post_attention_layernorm"]
    inside += [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    held = load_file(tmp_path / "model.safetensors")
    assert set(held) == {f"model.layers.{LLAMA.depth}.{name}.weight" for name in inside}
    assert held[f"model.layers.{LLAMA.depth}.eh_proj.weight"].shape == (LLAMA.width, 2 * LLAMA.width)
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["num_nextn_predict_layers"], values["num_hidden_layers"]) == (1, LLAMA.depth)


def in_one(tmp_path, kind="sequential", copies=False):
    """Decoder and modules in one folder, as DeepSeek-V3's release has them."""
    model, mtp = made(kind)
    write_folder(model, tmp_path)
    write_mtp(mtp, model, tmp_path / "apart")
    tensors = load_file(tmp_path / "model.safetensors") | load_file(tmp_path / "apart" / "model.safetensors")
    if copies:
        for k in range(2):
            tensors[f"model.layers.{LLAMA.depth + k}.embed_tokens.weight"] = (
                model.model.embed_tokens.weight.data.clone()
            )
            tensors[f"model.layers.{LLAMA.depth + k}.shared_head.head.weight"] = model.output_weight.data.clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((tmp_path / "apart" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values))
    return model, mtp, tensors


@pytest.mark.parametrize(("kind", "copies"), [("sequential", False), ("sequential", True), ("parallel", False)])
def test_one_folder_gives_the_plain_decoder_aloud_and_the_modules(kind, copies, tmp_path):
    model, mtp, _ = in_one(tmp_path, kind, copies)
    place = f"model.layers.{LLAMA.depth}." if kind == "sequential" else "model.extra_heads.0."
    with pytest.warns(UserWarning, match=rf"tensors of multi-token prediction \({place}.*read_mtp reads them"):
        plain = read_folder(tmp_path)
    assert same(plain, model)
    assert same(read_mtp(tmp_path, plain), mtp)
    ids = some_ids()
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model(ids).logits)


@pytest.mark.parametrize("copies", [False, True])
def test_modules_for_a_quantised_decoder(copies, tmp_path):
    model, mtp = made(
        "sequential", dataclasses.replace(LLAMA, vocabulary=64, width=64, embedding_width=64, mlp=GatedMLP(96))
    )
    write_mtp(mtp, model, tmp_path)
    if copies:
        name, tensors = "model.layers.2.shared_head.head.weight", load_file(tmp_path / "model.safetensors")
        save_file(tensors | {name: model.lm_head.weight.detach().clone()}, tmp_path / "model.safetensors")
    quantised = copy.deepcopy(model)
    quantize_model(quantised, "int4")
    assert isinstance(quantised.lm_head, WeightOnlyLinear)
    assert same(read_mtp(tmp_path, quantised), mtp)


def test_layers_that_are_not_announced_are_named(tmp_path):
    in_one(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["num_nextn_predict_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(values))
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(VolvelleError, match=rf"unknown model\.layers\.{LLAMA.depth + 1}\."),
    ):
        read_folder(tmp_path)
    with pytest.raises(VolvelleError, match=rf"unknown model\.layers\.{LLAMA.depth + 1}\."):
        read_mtp(tmp_path, build())
    del values["num_nextn_predict_layers"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(VolvelleError, match=rf"unknown model\.layers\.{LLAMA.depth}\."):
        read_folder(tmp_path)
    with pytest.raises(VolvelleError, match="announces no modules of multi-token prediction"):
        read_mtp(tmp_path, build())


def test_a_copy_that_differs_from_what_is_shared_is_refused(tmp_path):
    model, _, tensors = in_one(tmp_path, copies=True)
    name = f"model.layers.{LLAMA.depth}.shared_head.head.weight"
    tensors[name] = tensors[name] + 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VolvelleError, match=rf"{name} differs from the decoder's own"):
        read_mtp(tmp_path, model)


def test_missing_tensors_other_shapes_and_other_decoders_are_named(tmp_path):
    model, mtp = made(depths=1)
    write_mtp(mtp, model, tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.{LLAMA.depth}.hnorm.weight"
    save_file({key: tensor for key, tensor in held.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(VolvelleError, match=f"missing {name}"):
        read_mtp(tmp_path, model)
    save_file(held | {name: torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(VolvelleError, match=rf"{name} has shape \(3,\)"):
        read_mtp(tmp_path, model)
    other = build(dataclasses.replace(LLAMA, depth=3))
    with pytest.raises(VolvelleError, match="made for a decoder with depth = 2, and this one has 3"):
        read_mtp(tmp_path, other)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"mtp_kind": "paralel"}))
    with pytest.raises(VolvelleError, match="mtp_kind = 'paralel' is not known") as caught:
        read_mtp(tmp_path, model)
    assert "parallel" in caught.value.tip
