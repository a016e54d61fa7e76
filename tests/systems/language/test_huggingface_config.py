"""config.json both ways, and the key maps: every field kept, every tensor placed, what is not built refused by name."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from tests.systems.language.test_decoder import GPT2, LLAMA, ROFORMER, build

from volvelle.errors import VolvelleError
from volvelle.systems.language import config as c
from volvelle.systems.language.huggingface_config import config_from_dict, config_to_dict, family_of
from volvelle.systems.language.key_maps import KEY_MAPS

QWEN2 = dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True, special=c.SpecialTokens(None, (3, 4), 5))
SCALINGS = [
    c.LinearScaling(2.0),
    c.DynamicScaling(4.0),
    c.YarnScaling(4.0, 32, beta_fast=16.0, mscale=1.0, mscale_all_dim=0.5, truncate=False),
    c.LongRopeScaling((1.0, 2.0, 3.0), (2.0, 3.0, 4.0), 32, 8.0),
    c.Llama3Scaling(8.0, 32),
]


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        QWEN2,
        GPT2,
        ROFORMER,
        dataclasses.replace(LLAMA, head_width=10, qkv_bias=True, out_bias=True, mlp=c.GatedMLP(7, "gelu_tanh", True)),
        dataclasses.replace(GPT2, mlp=c.MLP(9, "relu"), dropout=c.Dropout(0.1, 0.2, 0.3), head=c.Head(tied=False)),
        dataclasses.replace(ROFORMER, causal=True, position=c.Rope(layout="interleaved", rotate_value=True)),
        *(dataclasses.replace(LLAMA, position=c.Rope(base=5e5, scaling=scaling)) for scaling in SCALINGS),
    ],
)
def test_a_configuration_survives_writing_and_reading(config):
    assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (dataclasses.replace(LLAMA, qkv_bias=True), "out_bias"),
        (dataclasses.replace(LLAMA, position=c.Learned()), "position"),
        (dataclasses.replace(LLAMA, dropout=c.Dropout(residual=0.1)), "dropout"),
        (dataclasses.replace(LLAMA, norm=c.LayerNorm()), "norm"),
        (dataclasses.replace(GPT2, kv_heads=2), "kv_heads"),
        (dataclasses.replace(GPT2, position=c.Sinusoidal()), "position"),
        (dataclasses.replace(ROFORMER, order="pre"), "order"),
    ],
)
def test_a_model_the_family_cannot_hold_is_refused_by_field(config, field):
    with pytest.raises(VolvelleError, match=field):
        config_to_dict(config)


def test_older_spellings_of_rope_are_read():
    values = config_to_dict(LLAMA)
    values.pop("rope_parameters")
    values |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}
    assert config_from_dict(values).position == c.Rope(base=5e5, scaling=c.LinearScaling(2))


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (QWEN2, {"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        (QWEN2, {"layer_types": ["sliding_attention"]}, "sliding_attention"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
        (ROFORMER, {"tie_word_embeddings": False}, "tie_word_embeddings"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantised"),
        (LLAMA, {"hidden_act": "mish"}, "hidden_act = 'mish'"),
        (LLAMA, {"hidden_size": "24"}, "hidden_size must be int"),
        (LLAMA, {"hidden_size": None}, "hidden_size is missing"),
        (LLAMA, {"num_key_value_heads": 3}, "multiple of kv_heads"),
        (LLAMA, {"rope_parameters": {"rope_type": "spiral"}}, "rope type 'spiral'"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_built_is_refused_by_name(base, change, message):
    with pytest.raises(VolvelleError, match=message):
        config_from_dict(config_to_dict(base) | change)


@pytest.mark.parametrize("name", ["FalconForCausalLM", "LlamaForSequenceClassification", None])
def test_a_wrong_architecture_lists_the_known_ones(name):
    values = {} if name is None else {"architectures": [name], "model_type": "llama"}
    with pytest.raises(VolvelleError, match="architecture") as caught:
        family_of(values)
    assert "LlamaForCausalLM" in str(caught.value.tip)
    assert "RoFormerForMaskedLM" in str(caught.value.tip)


@pytest.mark.parametrize("config", [LLAMA, QWEN2, GPT2, ROFORMER], ids=lambda config: config.family)
def test_key_maps_are_bijections_bit_by_bit(config):
    parameters = dict(build(config).named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    bindings = KEY_MAPS[config.family].bind(shapes)
    assert sorted(name for binding in bindings for name in binding.ours) == sorted(parameters)
    assert len({binding.theirs for binding in bindings}) == len(bindings)
    for binding in bindings:
        whole = binding.join(parameters)
        assert tuple(whole.shape) == binding.their_shape
        assert whole.is_contiguous()
        for name, part in binding.split(whole, source="a file").items():
            assert torch.equal(part, parameters[name]), name


def test_gpt2s_fused_projection_is_the_concatenation_transposed():
    parameters = dict(build(GPT2).named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    places = {binding.theirs: binding for binding in KEY_MAPS["gpt2"].bind(shapes)}
    fused = places["transformer.h.1.attn.c_attn.weight"].join(parameters)
    assert fused.shape == (24, 72)
    assert torch.equal(fused[:, 24:48], parameters["model.layers.1.self_attn.k_proj.weight"].T)
    assert places["transformer.h.1.attn.c_attn.bias"].their_shape == (72,)


def test_configurations_are_read_without_torch():
    code = (
        "import sys; from volvelle.systems.language.huggingface_config import config_from_dict; "
        "import volvelle.systems.language.config; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
