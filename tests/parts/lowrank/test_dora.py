"""DoRA: the paper's equation against a dense oracle, the constant norm, dropout, and PEFT as the peer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from volvelle.parts.lowrank.dora import DoRAUpdate, column_norm, dora_linear


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    shapes = {"x": (2, 3, 5), "weight": (7, 5), "bias": (7,), "a": (3, 5), "b": (7, 3), "magnitude": (7,)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("bias", [True, False])
def test_equation_5(tensors, bias):
    if not bias:
        tensors["bias"] = None
    x, weight, _, a, b, m = tensors.values()
    v = weight + 0.7 * b @ a
    dense = torch.stack([m[i] * v[i] / v[i].square().sum().sqrt() for i in range(7)])
    torch.testing.assert_close(dora_linear(*tensors.values(), 0.7), F.linear(x, dense, tensors["bias"]))


def test_gradients_in_double_with_the_norm_a_constant(tensors):
    norm = column_norm(tensors["weight"], 0.7 * tensors["b"] @ tensors["a"])
    inputs = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(lambda *t: dora_linear(*t, 0.7, norm=norm), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: dora_linear(*t, 0.7, norm=norm), inputs)


def test_the_norm_passes_no_gradient(tensors):
    """As if it were a number: a mutant that lets gradients through it would differ here."""
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    given = column_norm(leaves["weight"], 0.7 * (leaves["b"] @ leaves["a"]))
    ours = torch.autograd.grad(dora_linear(*leaves.values(), 0.7).square().sum(), list(leaves.values()))
    fixed = torch.autograd.grad(dora_linear(*leaves.values(), 0.7, norm=given).square().sum(), list(leaves.values()))
    for left, right in zip(ours, fixed, strict=True):
        assert torch.equal(left, right)
    live = torch.linalg.vector_norm(leaves["weight"] + 0.7 * leaves["b"] @ leaves["a"], dim=1)
    mutant = torch.autograd.grad(dora_linear(*leaves.values(), 0.7, norm=live).square().sum(), leaves["a"])
    assert not torch.allclose(ours[3], mutant[0])


def test_an_output_without_weights_stays_zero():
    layer = nn.Linear(5, 7)
    nn.init.zeros_(layer.weight[3])
    x = torch.randn(2, 5)
    result = layer(x)
    assert torch.equal(DoRAUpdate(layer, 2).update(layer, x, result), result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_changes_of_magnitude_are_not_rounded_away(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, dtype=dtype)
    x = torch.randn(400, 64, dtype=dtype)
    update = DoRAUpdate(layer, 2)
    with torch.no_grad():
        update.magnitude *= 1.03  # the nearest number of bf16 is 1.03125, which would change 4 % more
        result = layer(x)
        change = (update.update(layer, x, result) - result).float()
        want = 0.03 * (result - layer.bias).float()
        got = float((change * want).sum() / want.square().sum())
    # Rounded to the result's dtype each change is noisy, but on average it is there.
    assert got == pytest.approx(1.0, abs=0.015 if dtype is torch.bfloat16 else 1e-3)


def test_shapes_that_do_not_fit_are_named(tensors):
    with pytest.raises(ValueError, match=r"dora_linear: magnitude must be \(7,\), got \(5,\)"):
        dora_linear(*{**tensors, "magnitude": torch.ones(5)}.values(), 1.0)
    with pytest.raises(ValueError, match=r"dora_linear: a must be \(r, 5\) and b \(7, r\)"):
        dora_linear(*{**tensors, "a": torch.ones(3, 4)}.values(), 1.0)


def test_exports_to_one_graph(tensors):
    class Layer(nn.Module):
        def forward(self, x, weight, bias, a, b, magnitude):
            return dora_linear(x, weight, bias, a, b, magnitude, 0.7)

    exported = torch.export.export(Layer(), tuple(tensors.values()))
    torch.testing.assert_close(exported.module()(*tensors.values()), dora_linear(*tensors.values(), 0.7))


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "embedding"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_outputs_and_gradients_equal_peft(kind, dropout):
    """In training mode, with the same dropout mask: both draw it from the same generator in the same order."""
    peft = pytest.importorskip("peft")
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(1)
    base = {
        "linear": lambda: nn.Linear(5, 7),
        "conv1d": lambda: pytorch_utils.Conv1D(7, 5),
        "conv2d": lambda: nn.Conv2d(5, 7, 3, stride=2, padding=1),
        "embedding": lambda: nn.Embedding(5, 7),
    }[kind]().double()
    layer = copy.deepcopy(base)
    ours = DoRAUpdate(layer, 3, 4.0, dropout=dropout)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, mean=0.5)
    config = peft.LoraConfig(
        r=3, lora_alpha=4, target_modules=["0"], use_dora=True, lora_dropout=dropout, fan_in_fan_out=kind == "conv1d"
    )
    theirs = peft.get_peft_model(nn.Sequential(base), config).double()
    lora = theirs.base_model.model[0]
    magnitude = lora.lora_magnitude_vector["default"].weight
    if kind == "embedding":
        a, b = lora.lora_embedding_A["default"], lora.lora_embedding_B["default"]
        x = torch.tensor([[0, 4, 4], [1, 2, 3]])
    else:
        a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
        x = torch.randn((2, 5, 6, 8) if kind == "conv2d" else (2, 4, 5), dtype=torch.float64)
    with torch.no_grad():
        for own, other in ((ours.a, a), (ours.b, b), (ours.magnitude, magnitude)):
            other.copy_(own.view_as(other))
    theirs.train()
    torch.manual_seed(5)
    got = ours.update(layer, x, layer(x))
    torch.manual_seed(5)
    expected = theirs(x)
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()
    for own, other in ((ours.a, a), (ours.b, b), (ours.magnitude, magnitude)):
        torch.testing.assert_close(own.grad, other.grad.view_as(own))
