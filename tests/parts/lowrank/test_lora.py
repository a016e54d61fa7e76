"""LoRA on linear layers: the equation against a dense oracle, its gradients, its dtypes, merging, and PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from volvelle.parts.lowrank.kinds import why_not
from volvelle.parts.lowrank.lora import LoRALinear, lora_linear, lora_rows


def random_layer(d=6, k=5, r=3, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(k, d, bias=bias, dtype=dtype), rank=r, alpha=2.0)
    nn.init.normal_(layer.b)
    return layer


@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (2, 7, 5), (2, 0, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_dense_weight(shape, bias):
    layer = random_layer(bias=bias)
    x = torch.randn(shape, dtype=torch.float64)
    expected = x @ (layer.weight + layer.scale * layer.b @ layer.a).T + (layer.bias if bias else 0.0)
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).shape == (*shape[:-1], 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (2, 37, 64)])
def test_step_zero_is_bitwise_the_base(dtype, shape):
    base = nn.Linear(64, 48, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    assert torch.equal(LoRALinear(base, rank=4)(x), base(x))


def test_step_zero_under_autocast_is_bitwise_the_base():
    base = nn.Linear(64, 48)
    x = torch.randn(2, 9, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LoRALinear(base, rank=4)(x), base(x))


def test_gradients_in_double():
    layer = random_layer()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.weight, layer.bias, layer.a, layer.b)
    assert torch.autograd.gradcheck(lambda *t: lora_linear(*t, 0.7), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: lora_linear(*t, 0.7), inputs)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"lora_linear: a must be \(r, 5\) and b \(6, r\).*got a \(2, 4\)"):
        lora_linear(torch.ones(1, 5), torch.ones(6, 5), None, torch.ones(2, 4), torch.ones(6, 2), 1.0)


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_compute_follows_fp32(autocast):
    layer = random_layer(64, 48, 4, dtype=torch.float32)
    x = torch.randn(3, 48)
    expected = layer(x)
    if autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = layer(x)
    else:
        half = LoRALinear(nn.Linear(48, 64).bfloat16(), rank=4, alpha=2.0)
        half.load_state_dict(layer.state_dict())
        assert half.a.dtype == half.b.dtype == torch.float32
        got = half(x.bfloat16())
        got.float().sum().backward()
        assert half.a.grad is not None
        assert half.a.grad.dtype == torch.float32
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.03, atol=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge(dtype):
    base = nn.Linear(32, 24, dtype=dtype)
    layer = LoRALinear(base, rank=4, alpha=3.0)
    nn.init.normal_(layer.b, std=0.1)
    x = torch.randn(5, 32, dtype=dtype)
    before = layer(x)
    merged = layer.merge()
    assert merged is base
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(merged(x), before, rtol=tolerance, atol=tolerance)
    assert not torch.equal(base.weight, layer.weight)
    assert base.weight is not layer.weight, "the layer keeps the original"


def test_dropout_only_touches_the_low_rank_path():
    layer = LoRALinear(nn.Linear(16, 16), rank=2, dropout=0.5)
    x = torch.randn(64, 16)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), base), "with B = 0 dropout must not show"
    nn.init.normal_(layer.b)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_the_state_dict_keeps_the_base_names():
    layer = random_layer()
    assert sorted(layer.state_dict()) == ["a", "b", "bias", "weight"]
    twin = copy.deepcopy(layer)
    assert twin._base[0].weight is twin.weight, "a copy merges into its own base"
    assert twin.weight is not layer.weight


def test_layers_that_cannot_carry_it_are_refused():
    class Odd(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    attention = nn.MultiheadAttention(4, 2)
    assert "reads its out_proj.weight directly" in (why_not(attention.out_proj) or "")
    assert "overrides nn.Linear.forward" in (why_not(Odd(2, 2)) or "")
    assert "parametrization" in (why_not(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))) or "")
    assert "max_norm changes the weight" in (why_not(nn.Embedding(2, 2, max_norm=1.0)) or "")
    with pytest.raises(TypeError, match="LoRALinear: a Conv2d is not linear"):
        LoRALinear(nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match="LoRALinear: a ReLU has no weight that it only multiplies with"):
        LoRALinear(nn.ReLU())
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        LoRALinear(nn.Linear(2, 2), rank=0)


def test_compiles_to_one_graph():
    layer = random_layer(dtype=torch.float32)
    exported = torch.export.export(layer, (torch.randn(3, 5),))
    x = torch.randn(3, 5)
    torch.testing.assert_close(exported.module()(x), layer(x))


@pytest.mark.peer
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_equal_peft(conv1d, rslora):
    peft = pytest.importorskip("peft")
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(1)
    base = pytorch_utils.Conv1D(7, 5) if conv1d else nn.Linear(5, 7)
    base = base.double()
    ours = LoRALinear(copy.deepcopy(base), rank=3, alpha=4.0, rslora=rslora)
    nn.init.normal_(ours.b)
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=["0"], use_rslora=rslora, fan_in_fan_out=conv1d)
    theirs = peft.get_peft_model(nn.Sequential(base), config)
    lora = theirs.base_model.model[0]
    lora.lora_A["default"].weight.data = ours.a.data.clone()
    lora.lora_B["default"].weight.data = ours.b.data.clone()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    got, expected = ours(x), theirs(x)
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.a.grad, lora.lora_A["default"].weight.grad)
    torch.testing.assert_close(ours.b.grad, lora.lora_B["default"].weight.grad)
    torch.testing.assert_close(ours.merge()(x), expected)


@pytest.mark.peer
def test_step_zero_is_bitwise_a_conv1d():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    base = pytorch_utils.Conv1D(12, 8)
    x = torch.randn(2, 5, 8)
    assert torch.equal(LoRALinear(base, rank=2)(x), base(x))


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5), (3, 2, 4, 5), (3, 0, 5)])
def test_rows_get_their_own_update(shape):
    torch.manual_seed(0)
    x, result = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:-1], 7, dtype=torch.float64)
    a, b = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(3, 7, 2, dtype=torch.float64)
    expected = torch.stack([result[i] + x[i] @ (b[i] @ a[i]).T for i in range(3)])
    torch.testing.assert_close(lora_rows(result, x, a, b), expected)
    inputs = [t.requires_grad_() for t in (result, x, a, b)]
    assert torch.autograd.gradcheck(lora_rows, inputs)
