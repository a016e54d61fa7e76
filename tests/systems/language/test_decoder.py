"""What the Decoder itself promises: names, masks, positions, checkpointing, compilation, clear errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from volvelle.errors import VolvelleError
from volvelle.parts.lowrank.lora import LoRALinear
from volvelle.systems.language import config as c
from volvelle.systems.language.decoder import Decoder

LLAMA = c.LanguageConfig(
    "llama",
    vocabulary=61,
    width=24,
    depth=2,
    heads=4,
    context=64,
    norm=c.RMSNorm(),
    mlp=c.GatedMLP(40),
    position=c.Rope(),
    kv_heads=2,
    init_std=0.2,
)
GPT2 = dataclasses.replace(
    LLAMA,
    family="gpt2",
    norm=c.LayerNorm(),
    mlp=c.MLP(40),
    position=c.Learned(),
    kv_heads=4,
    qkv_bias=True,
    out_bias=True,
)
ROFORMER = dataclasses.replace(
    GPT2,
    family="roformer",
    order="post",
    position=c.Rope(layout="interleaved"),
    segments=2,
    embedding_width=16,
    mlp=c.MLP(40, "gelu"),
    head=c.Head(bias=True, transform="gelu"),
    causal=False,
)


def build(config=LLAMA, seed=0):
    torch.manual_seed(seed)
    return Decoder(config).eval()


def some_ids(batch=2, length=9):
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def test_parameters_carry_llamas_names():
    layer = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    layer += ["input_layernorm", "post_attention_layernorm"]
    expected = {f"model.layers.{i}.{name}.weight" for i in range(2) for name in layer}
    expected |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert set(build().state_dict()) == expected


def test_a_tied_head_is_one_parameter():
    model = build()
    assert model.output_weight is model.model.embed_tokens.weight
    untied = build(dataclasses.replace(LLAMA, head=c.Head(tied=False)))
    assert untied.output_weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("config", [LLAMA, GPT2, ROFORMER], ids=lambda config: config.family)
@torch.no_grad()
def test_padding_does_not_change_the_real_tokens(config):
    model, ids = build(config), some_ids(1, 5)
    alone = model(ids).logits
    for left in (0, 3):
        padded = torch.cat((torch.full((1, left), 7), ids, torch.full((1, 3 - left), 7)), dim=1)
        mask = torch.zeros(1, 8, dtype=torch.bool)
        mask[:, left : left + 5] = True
        torch.testing.assert_close(model(padded, mask=mask).logits[:, left : left + 5], alone)


@torch.no_grad()
def test_a_packed_row_equals_its_documents_alone():
    model, ids = build(), some_ids(1, 9)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2]])
    mask = (documents[:, :, None] == documents[:, None, :]) & torch.ones(9, 9, dtype=torch.bool).tril()
    packed = model(ids, mask=mask).logits
    for start, end in ((0, 4), (4, 7), (7, 9)):
        torch.testing.assert_close(packed[:, start:end], model(ids[:, start:end]).logits)


@torch.no_grad()
def test_a_tree_in_the_cache_equals_each_of_its_paths():
    model = build()
    prompt, (a, b, d) = some_ids(1, 4), (5, 17, 33)
    cache = model.new_cache(1, 16)
    model(prompt, cache=cache)
    cache.commit()
    tree = torch.tensor([[[1, 0, 0], [0, 1, 0], [1, 0, 1]]], dtype=torch.bool)  # a, b are siblings, d follows a
    logits = model(torch.tensor([[a, b, d]]), mask=tree, cache=cache).logits
    for path, nodes in (((a, d), (0, 2)), ((b,), (1,))):
        whole = model(torch.cat((prompt, torch.tensor([path])), dim=1)).logits[:, 4:]
        torch.testing.assert_close(logits[:, list(nodes)], whole)


@torch.no_grad()
def test_forward_is_hidden_then_logits_and_explicit_positions_are_the_default():
    model, ids = build(), some_ids()
    out = model(ids)
    assert torch.equal(out.hidden, model.hidden(ids, positions=torch.arange(9)))
    assert torch.equal(out.logits, model.logits(out.hidden))
    assert model.plain_head
    torch.testing.assert_close(out.logits, out.hidden @ model.output_weight.T)
    assert not torch.allclose(out.logits, model(ids, positions=2 * torch.arange(9)).logits)


@pytest.mark.parametrize("config", [LLAMA, GPT2, ROFORMER], ids=lambda config: config.family)
def test_gradient_checkpointing_changes_no_gradient(config):
    model, ids = build(config).train(), some_ids()
    found = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


def test_gradient_checkpointing_reaches_adapters_over_frozen_weights():
    model, ids = build().train().requires_grad_(False), some_ids()
    for layer in model.model.layers:
        layer.self_attn.q_proj = LoRALinear(layer.self_attn.q_proj, rank=2)
        torch.nn.init.normal_(layer.self_attn.q_proj.b)
    found = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert len(found[0]) == 4
    assert all(grad.abs().sum() > 0 and torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_dropout_acts_in_training_only():
    rates = c.Dropout(embedding=0.3, residual=0.3, attention=0.3)
    for config in (LLAMA, ROFORMER):
        model, ids = build(dataclasses.replace(config, dropout=rates)), some_ids()
        plain = build(config)
        assert torch.equal(model(ids).logits, plain(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


def test_attention_dropout_keeps_causal_order():
    model = build(dataclasses.replace(LLAMA, dropout=c.Dropout(attention=0.5))).train()
    ids = some_ids(1, 6)
    changed = ids.clone()
    changed[0, 5] += 1
    torch.manual_seed(0)
    first = model(ids).logits
    torch.manual_seed(0)
    second = model(changed).logits
    assert torch.equal(first[:, :5], second[:, :5])
    assert not torch.equal(first[:, 5], second[:, 5])


@pytest.mark.parametrize("config", [LLAMA, GPT2, ROFORMER], ids=lambda config: config.family)
@torch.no_grad()
def test_compiled_as_one_graph_equals_eager(config):
    torch.compiler.reset()
    model, ids = build(config), some_ids()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 6:] = False
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
    torch.testing.assert_close(compiled(ids, mask=mask).logits, model(ids, mask=mask).logits)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_by_inductor_equals_eager():
    torch.compiler.reset()
    model, ids = build(), some_ids()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_meta_device_allocates_nothing():
    with torch.device("meta"):
        model = Decoder(LLAMA)
    assert all(parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
def test_casting_keeps_positions_exact():
    model = build().to(torch.bfloat16)
    assert model.model.position.frequencies.dtype is torch.float64
    logits = model(some_ids()).logits
    assert logits.dtype is torch.bfloat16
    torch.testing.assert_close(logits.float(), build()(some_ids()).logits, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(3, dtype=torch.long)}, r"token ids must be integers of shape \(b, n\)"),
        ({"ids": torch.zeros(2, 0, dtype=torch.long)}, "token ids must be"),
        ({"ids": torch.zeros(2, 3)}, "token ids must be"),
        ({"mask": torch.ones(2, 8, dtype=torch.bool)}, r"mask must be bool of shape \(2, 9\)"),
        ({"mask": torch.ones(2, 9)}, "mask must be bool"),
        ({"segments": torch.zeros(2, 9, dtype=torch.long)}, "no segment embeddings"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"ids": some_ids(), **change}
    with pytest.raises(VolvelleError, match=message):
        build()(arguments.pop("ids"), **arguments)


def test_a_masked_model_has_no_cache():
    with pytest.raises(VolvelleError, match="both directions"):
        build(ROFORMER).new_cache(1, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"width": 0}, "width must be positive"),
        ({"position": c.Rope(dim=7)}, "must be even"),
        ({"embedding_width": 8}, "tied head without transform"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **change)
