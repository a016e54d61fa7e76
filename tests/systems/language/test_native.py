"""The compiled step: the modules' numbers, whatever the shape, and the same bits at every width."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess

import pytest
import torch
from torch import nn

from volvelle import processor
from volvelle.parts.attention.cache import KVCache
from volvelle.parts.quantization.int4 import Int4Linear
from volvelle.parts.quantization.int8 import Int8Linear
from volvelle.systems.language import config as c
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.native import library as builder
from volvelle.systems.language.native import step as native
from volvelle.systems.language.projections import fuse_projections
from volvelle.systems.language.quantized import quantize_model

LLAMA = c.LanguageConfig(
    "llama", vocabulary=80, width=64, depth=2, heads=4, context=128, norm=c.RMSNorm(), mlp=c.GatedMLP(96),
    position=c.Rope(), kv_heads=2, init_std=0.1,
)  # fmt: skip
BIASED = dataclasses.replace(
    LLAMA, qkv_bias=True, out_bias=True, mlp=c.GatedMLP(96, bias=True), position=c.Rope(dim=8), kv_heads=4
)
INTERLEAVED = dataclasses.replace(LLAMA, position=c.Rope(layout="interleaved"), heads=2, kv_heads=1)
CONFIGS = {"llama": LLAMA, "biased": BIASED, "interleaved": INTERLEAVED}
PRECISIONS = ("fp32", "bf16", "int4", "int8")

pytestmark = pytest.mark.skipif(builder.library() is None, reason="no compiled step on this machine")


def build(config, precision="fp32", fused=True):
    torch.manual_seed(0)
    model = Decoder(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    if precision != "fp32":
        model.to(torch.bfloat16)
    if precision.startswith("int"):
        quantize_model(model, precision)
    if fused:
        fuse_projections(model)
        assert model.model.straight.whole is not None
    return model


def some_ids(b, n):
    return torch.randint(0, 80, (b, n), generator=torch.Generator().manual_seed(n))


def steps(model, ids, sizes, masks=None):
    """Logits of all tokens, fed in steps of these sizes."""
    cache, found, at = model.new_cache(len(ids), ids.shape[1] + 4), [], 0
    for number, size in enumerate(sizes):
        mask = None if masks is None else masks[number]
        found.append(model(ids[:, at : at + size], cache=cache, mask=mask).logits)
        cache.commit()
        at += size
    return torch.cat(found, 1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", list(CONFIGS))
@torch.inference_mode()
def test_it_gives_the_modules_numbers(name, precision):
    config, ids = CONFIGS[name], some_ids(2, 21)
    plain, fast = build(config, precision, fused=False), build(config, precision)
    # An oracle in fp64 of the same weights: 16 bits lose something, but the compiled step not more than the modules.
    exact = build(config, precision, fused=False)
    for path, layer in list(exact.named_modules()):
        if isinstance(layer, Int4Linear | Int8Linear):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            dense.weight.data = layer.dequantized(torch.float64)
            if layer.bias is not None:
                dense.bias.data = layer.bias.double()
            exact.set_submodule(path, dense)
    exact.double()
    sizes = (5, 1, 8, 7)
    expected = exact(ids).logits
    found, modules = steps(fast, ids, sizes), steps(plain, ids, sizes)
    off, allowed = (found - expected).abs().max(), (modules - expected).abs().max()
    assert off <= (1e-4 if precision == "fp32" else max(1.5 * allowed, 1e-2))


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.inference_mode()
def test_a_token_gets_the_same_bits_at_every_width_and_in_every_batch(precision):
    model, ids = build(LLAMA, precision), some_ids(3, 33)
    alone = torch.cat([steps(model, row[None], (1,) * 33) for row in ids])
    for sizes in ((1, 32), (2, 3, 28), (10, 10, 10, 3)):
        assert torch.equal(steps(model, ids[:1], sizes), alone[:1])
    assert torch.equal(steps(model, ids, (1,) * 13 + (10, 10)), alone)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(steps(model, ids[:1], (9, 24)), alone[:1])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.inference_mode()
def test_padding_holes_and_trees(dtype):
    model, plain = build(LLAMA, dtype), build(LLAMA, dtype, fused=False)
    ids, tolerance = some_ids(2, 16), 1e-4 if dtype == "fp32" else 0.1
    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[1, :4] = False
    tree = torch.eye(5, dtype=torch.bool)
    tree[:, 0] = True
    tree[3, 1] = tree[4, 2] = True

    def run(one):
        cache, found = one.new_cache(2, 20), []
        for part, mask, path in (
            (ids[:, :6], padding, None),
            (ids[:, 6:11], tree.expand(2, 5, 5), torch.tensor([[0, 1, 3], [0, 2, -1]])),  # the second row keeps fewer
            (ids[:, 11:12], None, None),
            (ids[:, 12:], None, None),
        ):
            logits = one(part, cache=cache, mask=mask).logits
            found.append(logits if mask is not padding else logits[:, -1:])
            cache.commit(path)
        return torch.cat(found, 1), cache.storage[:, :, :, :, : cache.length]

    (found, keys), (expected, modules) = run(model), run(plain)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    seen = cache_of_real(modules)
    torch.testing.assert_close(keys[seen], modules[seen], rtol=tolerance, atol=tolerance)


def cache_of_real(storage):
    """Without row 1's padding, whose keys nobody reads."""
    real = torch.ones_like(storage, dtype=torch.bool)
    real[:, :, 1, :, :4] = False
    return real


@torch.inference_mode()
def test_long_texts_are_cut_into_chunks_of_keys():
    config = dataclasses.replace(LLAMA, context=1024)
    model, plain, ids = build(config), build(config, fused=False), some_ids(1, 700)
    torch.testing.assert_close(steps(model, ids, (650, 20, 30)), steps(plain, ids, (700,)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_changes_of_weights_are_seen():
    model, ids = build(LLAMA), some_ids(1, 6)
    before = steps(model, ids, (3, 3))
    model.model.layers[0].mlp.up_proj.weight.mul_(1.5)  # in place: the same memory
    changed = steps(model, ids, (3, 3))
    assert not torch.equal(before, changed)
    model.model.layers[1].self_attn.o_proj.weight.data = torch.randn(64, 64)  # another memory
    fuse_projections(model)
    assert not torch.equal(steps(model, ids, (3, 3)), changed)
    model.model.layers[0].self_attn.q_proj = Int8Linear.from_linear(model.model.layers[0].self_attn.q_proj)
    with torch.inference_mode():
        torch.testing.assert_close(steps(model, ids, (3, 3)), model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("by", ["load_state_dict", "an optimiser", "data"])
def test_norms_and_biases_that_changed_in_place_are_seen(precision, by):
    """In 16 bits the code reads copies of them; other weights it reads where they are."""
    model, plain, ids = build(BIASED, precision), build(BIASED, precision, fused=False), some_ids(1, 6)
    before = steps_without_gradients(model, ids)
    small = {name: value for name, value in plain.state_dict().items() if "bias" in name or "norm" in name}
    for value in small.values():
        value.mul_(1.7).add_(0.3)  # tensors of a state dict are the weights themselves
    if by == "load_state_dict":
        model.load_state_dict(plain.state_dict())
    elif by == "data":
        for name, held in (*model.named_parameters(), *model.named_buffers()):
            held.data.copy_(small.get(name, held))
        fuse_projections(model)  # as every answer does; writing so can be seen only then
    else:
        for name, held in model.named_parameters():
            held.grad = held.detach() - small[name] if name in small else None
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        for name, held in model.named_buffers():
            if name in small:
                held.copy_(small[name])
    found = steps_without_gradients(model, ids)
    assert model.model.straight is not None
    assert not torch.equal(found, before)
    fresh = build(BIASED, precision)
    fresh.load_state_dict(model.state_dict())
    fresh.model.straight = None
    fuse_projections(fresh)
    assert torch.equal(found, steps_without_gradients(fresh, ids))


@torch.inference_mode()
def steps_without_gradients(model, ids):
    return steps(model, ids, (3, 1, 2))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"norm": c.LayerNorm()}, "RMSNorm"),
        ({"mlp": c.GatedMLP(96, activation="gelu")}, "SiLU"),
        ({"head_width": 8}, "multiple of 16 features"),
        ({"mlp": c.GatedMLP(100)}, "groups of 32"),
        ({"position": c.Rope(rotate_value=True)}, "rotates"),
    ],
)
def test_what_it_cannot_do_is_said_and_done_by_torch(change, says):
    model = Decoder(dataclasses.replace(LLAMA, **change)).eval()
    assert says in str(native.why_not(model))
    fuse_projections(model)
    assert model.model.straight is None or model.model.straight.whole is None


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.inference_mode()
def test_without_it_the_same_steps_run_as_operations(precision, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    model, plain, ids = build(LLAMA, precision, fused=False), build(LLAMA, precision, fused=False), some_ids(1, 24)
    fuse_projections(model)
    assert model.model.straight.whole is None
    tolerance = 1e-4 if precision == "fp32" else 0.1
    found, expected = steps(model, ids, (12, 1, 1, 4, 6)), plain(ids).logits
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_a_cache_in_another_dtype_or_a_wide_step_is_left_to_torch():
    model = build(LLAMA)
    with torch.inference_mode():
        for cache, n in ((model.new_cache(1, 64, torch.float64), 2), (model.new_cache(1, 64), native.MOST + 1)):
            x, step = model.begin(some_ids(1, n), cache=cache)
            assert not model.model.straight.whole.takes(x, step)
        assert isinstance(cache, KVCache)


def linear(library, layer, x):
    held = []
    weight = native._weight(layer, held, native.Copies())
    y = x.new_empty(len(x), layer.out_features)
    library.linear(ctypes.addressof(weight), x.data_ptr(), y.data_ptr(), len(x), int(x.dtype is torch.bfloat16), 1)
    return y


def layers(features, out):
    torch.manual_seed(out)
    dense = nn.Linear(features, out)
    return (
        dense,
        nn.Linear(features, out, dtype=torch.bfloat16),
        Int8Linear.from_linear(dense),
        Int4Linear.from_linear(dense),
    )


def agrees(library, n):
    for features, out in ((64, 48), (96, 16), (576, 160)):
        for layer in layers(features, out):
            dtype = layer.weight.dtype if isinstance(layer, nn.Linear) else torch.float32
            weight = layer.weight.double() if isinstance(layer, nn.Linear) else layer.dequantized(torch.float64)
            x = torch.randn(n, features).bfloat16().to(dtype)  # what 16 bits hold, tiles take over exactly
            expected = x.double() @ weight.T + layer.bias.double()
            found = linear(library, layer, x)
            tolerance = 0.01 if dtype is torch.bfloat16 else 2e-5
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
            assert torch.equal(found, torch.cat([linear(library, layer, row[None]) for row in x]))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 16, 19, 32, 70])
@torch.no_grad()
def test_products_agree_with_fp64(n):
    agrees(builder.library(), n)


PROCESSORS = {  # what the compiler may use, and the flag without which this one cannot run it
    "any": ((), None),
    "AVX2": (("-mavx2", "-mfma"), "avx2"),
    "AVX-512": (("-mavx512f", "-mavx512bw", "-mavx512vl"), "avx512f"),
    "pairs of bf16": (("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16"), "avx512_bf16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROCESSORS)
@torch.no_grad()
def test_products_agree_on_processors_without_tiles(kind, tmp_path):
    given, needed = PROCESSORS[kind]
    if needed and needed not in processor.flags():
        pytest.skip(f"this processor has no {needed}")
    path = tmp_path / "plain.so"
    flags = [flag.replace("-O3", "-O1") for flag in (*builder.FLAGS, *given)]
    subprocess.run(["g++", *flags, "-o", str(path), str(builder.FOLDER / "step.cpp")], check=True)
    plain = builder._declared(ctypes.CDLL(str(path)))
    assert not plain.tiles()
    for n in (1, 2, 3, 5, 32):
        agrees(plain, n)


def test_without_a_compiler_a_warning_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert builder.library.__wrapped__() is None
    assert "without compiled code" in caplog.text
    monkeypatch.setenv("VOLVELLE_NATIVE", "0")
    caplog.clear()
    assert builder.library.__wrapped__() is None
    assert not caplog.text


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path, caplog):
    false = tmp_path / "compiler"
    false.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "error: no such thing" >&2\nexit 1\n')
    false.chmod(0o755)
    monkeypatch.setenv("CXX", str(false))
    monkeypatch.setenv("VOLVELLE_HOME", str(tmp_path))
    assert builder.library.__wrapped__() is None
    assert "no such thing" in caplog.text
    assert not list((tmp_path / "native").glob("*.so"))
