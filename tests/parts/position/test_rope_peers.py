"""RoPE against transformers: Llama (half), GPT-J (interleaved, partial), RoFormer (interleaved), every scaling."""

import pytest
import torch

from volvelle.parts.position.rope import RotaryEmbedding, apply_rope, rope_frequencies
from volvelle.parts.position.rope_scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    ProportionalScaling,
    YaRNScaling,
)
from volvelle.parts.position.sinusoidal import sinusoidal_positions

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

HEAD = 16
SHORT, LONG = [1.0 + 0.1 * i for i in range(HEAD // 2)], [2.0 + 0.5 * i for i in range(HEAD // 2)]
CONTEXT = 64
YARN = {"original_max_position_embeddings": CONTEXT}

SCALINGS = [
    ({"rope_type": "default"}, None),
    ({"rope_type": "linear", "factor": 4.0}, LinearScaling(4.0)),
    ({"rope_type": "dynamic", "factor": 2.0}, DynamicNTKScaling(2.0, original_context=CONTEXT)),
    ({"rope_type": "yarn", "factor": 4.0, **YARN}, YaRNScaling(4.0, CONTEXT)),
    (
        {"rope_type": "yarn", "factor": 4.0, **YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        YaRNScaling(4.0, CONTEXT, beta_fast=16.0, beta_slow=2.0, truncate=False),
    ),
    (
        {"rope_type": "yarn", "factor": 40.0, **YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
        YaRNScaling(40.0, CONTEXT, mscale=0.707, mscale_all_dim=1.0),
    ),
    (
        {"rope_type": "yarn", "factor": 4.0, **YARN, "attention_factor": 0.7},
        YaRNScaling(4.0, CONTEXT, given_attention_factor=0.7),
    ),
    (
        {"rope_type": "longrope", "factor": 8.0, **YARN, "short_factor": SHORT, "long_factor": LONG},
        LongRoPEScaling(SHORT, LONG, CONTEXT, factor=8.0),
    ),
    (
        {"rope_type": "llama3", "factor": 8.0, **YARN, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        Llama3Scaling(8.0, CONTEXT),
    ),
    (
        {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5},
        ProportionalScaling(0.5, factor=2.0),
    ),
]
NAMES = [f"{parameters['rope_type']}{i}" for i, (parameters, _) in enumerate(SCALINGS)]


def llama_config(parameters, base=10000.0):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=4 * HEAD,
        num_attention_heads=4,
        head_dim=HEAD,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_theta": base, **parameters},
    )


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize(("parameters", "scaling"), SCALINGS, ids=NAMES)
@pytest.mark.parametrize("n", [7, 200])
def test_llama_rotary_embedding(parameters, scaling, base, n):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    theirs = LlamaRotaryEmbedding(llama_config(parameters, base))
    q, k = torch.randn(2, 4, n, HEAD), torch.randn(2, 2, n, HEAD)
    positions = torch.arange(n)
    expected = apply_rotary_pos_emb(q, k, *theirs(q, positions[None].expand(2, -1)))
    ours = RotaryEmbedding(HEAD, base=base, scaling=scaling)(q, k, positions)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4)  # theirs: fp32 angles up to 200
    torch.testing.assert_close(ours, apply_rope(q, k, positions, base=base, scaling=scaling))


@pytest.mark.parametrize("length", [8, 64, 65, 1000])
@pytest.mark.parametrize(("parameters", "scaling"), SCALINGS[1:], ids=NAMES[1:])
def test_frequencies_and_attention_factor(parameters, scaling, length):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = llama_config(parameters)
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length)
    ours = rope_frequencies(HEAD, scaling=scaling, length=torch.tensor(length))
    torch.testing.assert_close(ours.float(), expected, rtol=1e-6, atol=1e-9)
    assert scaling.attention_factor == pytest.approx(factor, abs=1e-12)


def test_gptj_interleaved_partial():
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb, create_sinusoidal_positions

    x = torch.randn(2, 5, 3, HEAD)  # (b, n, h, d), as theirs
    sin, cos = create_sinusoidal_positions(5, 8)[None].expand(2, -1, -1).chunk(2, dim=-1)
    turned = torch.cat((apply_rotary_pos_emb(x[..., :8], sin, cos), x[..., 8:]), dim=-1)
    ours, _ = apply_rope(*[x.transpose(1, 2)] * 2, torch.arange(5), layout="interleaved", dim=8)
    torch.testing.assert_close(ours.transpose(1, 2), turned, rtol=0, atol=1e-5)


def test_roformer_interleaved_and_its_sinusoidal_table():
    from transformers.models.roformer.modeling_roformer import (
        RoFormerSelfAttention,
        RoFormerSinusoidalPositionalEmbedding,
    )

    table = RoFormerSinusoidalPositionalEmbedding(32, HEAD)
    weight = table.create_weight() if hasattr(table, "create_weight") else table.weight
    table.weight = torch.nn.Parameter(torch.as_tensor(weight), requires_grad=False)
    angles = table((2, 9))
    torch.testing.assert_close(angles, sinusoidal_positions(torch.arange(9), HEAD, layout="half"), rtol=0, atol=1e-6)
    q, k, v = torch.randn(3, 2, 4, 9, HEAD)
    expected = RoFormerSelfAttention.apply_rotary_position_embeddings(angles[None, None], q, k, v)
    rotation = RotaryEmbedding(HEAD, layout="interleaved").rotation(torch.arange(9), torch.float32)
    for ours, theirs in zip((*rotation(q, k), rotation.turn(v)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_gpt_neox_partial_half():
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding, apply_rotary_pos_emb

    config = GPTNeoXConfig(hidden_size=4 * HEAD, num_attention_heads=4, rotary_pct=0.25)
    config.rope_parameters["partial_rotary_factor"] = 0.25
    q, k, positions = torch.randn(2, 4, 9, HEAD), torch.randn(2, 4, 9, HEAD), torch.arange(9)
    cos, sin = GPTNeoXRotaryEmbedding(config)(q, positions[None])
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    torch.testing.assert_close(apply_rope(q, k, positions, dim=4), expected, rtol=0, atol=1e-5)


def test_a_cast_model_of_theirs_loses_its_angles_and_ours_does_not():
    """Their frequencies are a buffer that .to(bfloat16) rounds; when this fails, they have repaired it."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    positions, bf16 = torch.tensor([2000]), torch.bfloat16
    exact = RotaryEmbedding(128).rotation(positions, torch.float64).cos
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=128)
    theirs, _ = LlamaRotaryEmbedding(config).to(bf16)(exact.to(bf16), positions[None])
    ours = RotaryEmbedding(128).to(bf16).rotation(positions, bf16).cos
    assert (theirs[0].double() - exact).abs().max() > 1
    assert (ours.double() - exact).abs().max() <= 2**-9  # half a unit in the last place
