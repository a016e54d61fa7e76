"""Joined projections: same names, same values, one storage, and never a stale result."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from tests.systems.language.test_decoder import GPT2, LLAMA, ROFORMER, build, some_ids

from volvelle.parts.lowrank.lora import LoRALinear
from volvelle.systems.language import config as c
from volvelle.systems.language.projections import _norm, apply_linear, fuse_projections, unfuse_projections

ROFORMER_CAUSAL = dataclasses.replace(ROFORMER, causal=True, position=c.Rope(layout="interleaved", rotate_value=True))
BIASED = dataclasses.replace(LLAMA, qkv_bias=True, out_bias=True, mlp=c.GatedMLP(40, bias=True), position=c.Rope(dim=4))


def storages(model):
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


def taken(model):
    """Whether a decoding step takes the prepared path."""
    with torch.no_grad():
        return model.model.prepared(torch.zeros(1)) is not None


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_fusing_keeps_names_values_and_results_and_can_be_undone(config, dtype):
    model, ids = build(config).to(dtype), some_ids()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identity, separate, expected = list(model.parameters()), storages(model), model(ids).logits
    single = model(ids[:1, :1]).logits
    groups = 4 if config is LLAMA else 2  # qkv and gate-up; GPT-2 has no gate
    assert fuse_projections(model) == groups
    prepared = model.model.straight
    assert fuse_projections(model) == groups  # again is free
    assert model.model.straight is prepared
    assert taken(model)
    assert all(a is b for a, b in zip(model.parameters(), identity, strict=True))
    assert len(storages(model)) < len(separate)
    sizes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(sizes.values()) == sum(p.nbytes for p in model.parameters())
    assert list(model.state_dict()) == list(before)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(model(ids).logits, expected, **tolerance)
    torch.testing.assert_close(model(ids[:1, :1]).logits, single, **tolerance)
    unfuse_projections(model)
    assert not taken(model)
    assert len(storages(model)) == len(separate)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(ids).logits, expected)


def test_training_a_fused_model_equals_training_a_separate_one():
    ids, losses = some_ids(), []
    for fuse in (False, True):
        model = build().train()
        if fuse:
            fuse_projections(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        history = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(ids).logits.square().mean()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        with torch.no_grad():
            history.append(model(ids).logits.square().mean().item())
            assert not taken(model.train())
            history.append(model.eval()(ids).logits.square().mean().item())
            assert taken(model) == fuse
        losses.append(history)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@torch.no_grad()
def test_a_cast_separates_the_layers_and_keeps_no_copy():
    model, ids = build(), some_ids()
    fuse_projections(model)
    model.to(torch.float64)
    assert model.model.straight is None
    assert torch.equal(model(ids).logits, build().to(torch.float64)(ids).logits)
    assert len(storages(model)) == len(storages(build()))
    assert fuse_projections(model) == 4
    model.model.layers[1].mlp.to(torch.float32)  # a part of it
    model.model.layers[1].mlp.to(torch.float64)
    assert not taken(model)


@torch.no_grad()
def test_new_weights_are_seen_however_they_come():
    other, ids = build(seed=5), some_ids()
    expected = other(ids).logits
    for assign in (False, True):
        model = build()
        fuse_projections(model)
        model.load_state_dict(other.state_dict(), assign=assign)
        model.tie()
        torch.testing.assert_close(model(ids).logits, expected)
    model = build()
    fuse_projections(model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data.clone()
    torch.testing.assert_close(model(ids).logits, expected)


@torch.no_grad()
def test_adapters_and_hooks_are_never_bypassed():
    model, ids = build(), some_ids()
    fuse_projections(model)
    plain = model(ids).logits
    layer = model.model.layers[0].self_attn
    adapted = LoRALinear(layer.v_proj, rank=2)
    torch.nn.init.normal_(adapted.b)
    original, layer.v_proj = layer.v_proj, adapted
    assert not taken(model)
    assert not torch.allclose(model(ids).logits, plain)
    assert fuse_projections(model) == 0
    layer.v_proj = original
    assert fuse_projections(model) == 4
    seen = []
    handle = layer.k_proj.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(ids).logits, plain)
    handle.remove()
    assert seen
    unfuse_projections(model)
    assert len(storages(model)) == len(storages(build()))


@torch.no_grad()
def test_autocast_and_anomalies_take_the_modules():
    model = build()
    fuse_projections(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not taken(model)
    assert taken(model)
    with torch.enable_grad():
        assert model(some_ids()).logits.requires_grad


@torch.no_grad()
def test_a_copy_of_a_fused_model_stands_alone():
    model, ids = build(), some_ids()
    fuse_projections(model)
    expected = model(ids).logits
    twin = copy.deepcopy(model)
    assert pickle.loads(pickle.dumps(model)).model.straight is None
    for parameter in model.parameters():
        parameter.zero_()
    assert not storages(twin) & storages(model)
    torch.testing.assert_close(twin(ids).logits, expected)


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_one_row_as_a_matrix_vector_product_equals_the_layer(bias):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(96, 200, bias=bias).bfloat16(), torch.randn(1, 1, 96).bfloat16()
    ours, theirs = apply_linear(layer, x), torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert ours.shape == theirs.shape
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


@pytest.mark.parametrize("config", [LLAMA, GPT2, ROFORMER_CAUSAL, BIASED], ids=["llama", "gpt2", "roformer", "biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_the_prepared_path_equals_the_modules_with_a_cache(config, dtype, batch):
    model, ids = build(config).to(dtype), some_ids(batch, 9)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[-1, :2] = batch == 1
    outputs = []
    for fuse in (False, True):
        if fuse:
            assert fuse_projections(model) == (2 if isinstance(config.mlp, c.MLP) else 4)
        cache, out = model.new_cache(batch, 9), []
        for start, end in ((0, 5), (5, 6), (6, 7), (7, 9)):
            out.append(model(ids[:, start:end], mask=mask if start == 0 else None, cache=cache).logits)
            cache.commit()
        outputs.append(torch.cat(out, dim=1))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.1}
    torch.testing.assert_close(outputs[1], outputs[0], **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-6, None, 0.0])
@torch.no_grad()
def test_norm_of_one_row_is_torchs(dtype, eps):
    layer = torch.nn.RMSNorm(48, eps=eps).to(dtype)
    layer.weight.normal_()
    norm = _norm(layer)
    x = torch.randn(48).to(dtype)
    nan, inf = x.clone(), x.clone()
    nan[3], inf[5] = torch.nan, -torch.inf
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 0.01, "atol": 0.01}
    for row in (x, 1e-4 * x, 1e25 * x, 0 * x, nan, inf):
        torch.testing.assert_close(norm(row), layer(row), equal_nan=True, **tolerance)
    layer.weight.mul_(2)  # the weight is the layer's own memory
    torch.testing.assert_close(norm(x), layer(x), **tolerance)
