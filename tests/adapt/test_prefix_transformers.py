"""Prefix and prompt tuning on transformers' models, with PEFT as the peer where it works."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from tests.adapt.prefix_models import gpt2, llama, other, shake
from transformers import DynamicCache

from volvelle import adapt
from volvelle.adapt.prefix import Prefaces
from volvelle.adapt.prefix_methods import PrefixTuning, PromptTuning
from volvelle.errors import VolvelleError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.peer

IDS = torch.arange(14).view(2, 7) * 5 % 59 + 1
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
MODELS = {"llama": llama, "gpt2": gpt2}
FAMILIES = ("Mistral", "Qwen2", "Qwen3", "Phi3", "GPTNeoX", "Olmo2")
METHODS = {
    "mlp": (PrefixTuning(4, hidden=6, init="random"), {"encoder_hidden_size": 6, "prefix_projection": True}),
    "plain": (PrefixTuning(4, hidden=None, init="random"), {}),
    "prompt": (PromptTuning(4, init="random"), None),
}


def pair(model, method):
    """Our adapter and PEFT's with equal parameters, on two copies of one model."""
    ours, options = METHODS[method]
    kind = peft.PromptTuningConfig if options is None else peft.PrefixTuningConfig
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=4, **(options or {}))
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    adapted = adapt.apply(model, ours)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    with torch.no_grad():
        for one, two in zip(adapted.trainable.values(), trained, strict=True):
            two.copy_(one)
    return model, theirs, list(adapted.trainable.values()), trained


def logits_of(output):
    return output.logits[:, -7:]


def same(one, two):
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("inputs", [{}, {"attention_mask": LEFT}, {"use_cache": False}], ids=["", "padded", "no cache"])
def test_outputs_and_gradients_are_pefts(name, method, implementation, inputs):
    model = MODELS[name]()
    model.set_attn_implementation(implementation)
    ours, theirs, trained, wanted = pair(model, method)
    real = LEFT.bool() if inputs.get("attention_mask") is not None else torch.ones(2, 7, dtype=torch.bool)
    results = [logits_of(m(input_ids=IDS, **inputs))[real] for m in (ours, theirs)]
    same(*results)
    for result in results:
        result.square().mean().backward()
    for one, two in zip(trained, wanted, strict=True):
        assert bool(two.grad.any())
        same(one.grad, two.grad)


def test_given_positions_are_those_of_the_text():
    ours, theirs, *_ = pair(llama(), "plain")
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4], list(range(7))])
    results = [m(input_ids=IDS, attention_mask=LEFT, position_ids=positions).logits for m in (ours, theirs)]
    same(*(result[LEFT.bool()] for result in results))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["mlp", "prompt"])
def test_other_families(family, method):
    ours, theirs, *_ = pair(other(family), method)
    same(*(logits_of(m(input_ids=IDS)) for m in (ours, theirs)))
    same(*(logits_of(m(input_ids=IDS, attention_mask=LEFT))[LEFT.bool()] for m in (ours, theirs)))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_recomputed_layers_give_the_same_gradients(name, method):
    """PEFT refuses this for prefixes."""
    model = MODELS[name]()
    trained = adapt.apply(model, METHODS[method][0]).trainable.values()
    gradients = []
    for switch in (False, True):
        if switch:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        calls = []
        handle = model.get_submodule("model.layers.1.input_layernorm" if name == "llama" else "transformer.h.1.ln_1")
        handle = handle.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(input_ids=IDS, attention_mask=LEFT).logits[LEFT.bool()].square().mean().backward()
        handle.remove()
        gradients.append([p.grad.clone() for p in trained])
        extra = int(METHODS[method][1] is None)  # the prompt's own pass, which is not recomputed
        assert len(calls) == (2 if switch else 1) + extra
    for one, two in zip(*gradients, strict=True):
        same(one, two)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@torch.no_grad()
def test_generation_is_that_of_whole_passes(name, method, options):
    model = MODELS[name]()
    shake(adapt.apply(model, METHODS[method][0]))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    answers = model.generate(IDS, attention_mask=LEFT, **options)[:, 7:]
    for row in range(2):
        text = IDS[row][LEFT[row].bool()][None]
        for token in answers[row]:
            assert int(model(input_ids=text).logits[0, -1].argmax()) == int(token)
            text = torch.cat((text, token.view(1, 1)), 1)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_beams_with_and_without_a_cache(method):
    model = llama()
    shake(adapt.apply(model, METHODS[method][0]))
    options = {"max_new_tokens": 6, "num_beams": 3, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    answers = [model.generate(IDS, attention_mask=LEFT, use_cache=switch, **options) for switch in (True, False)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_packed_rows_see_it_in_every_segment(name, method):
    model = MODELS[name]()
    shake(adapt.apply(model, METHODS[method][0]))
    packed = torch.cat((IDS[0, :4], IDS[1, :3]))[None]
    logits = model(input_ids=packed, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2]]), use_cache=False).logits[0]
    expected = [model(input_ids=IDS[:1, :4]).logits[0], model(input_ids=IDS[1:, :3]).logits[0]]
    same(logits, torch.cat(expected))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_of_different_adapters(name, implementation):
    model = MODELS[name]()
    model.set_attn_implementation(implementation)
    for key, method in {
        "long": PrefixTuning(5),
        "short": PrefixTuning(2, hidden=None),
        "asked": PromptTuning(3),
    }.items():
        shake(adapt.apply(model, method, name=key))
    rows = ["short", None, "long", "asked"]
    ids = torch.cat((IDS, IDS.flip(1)))
    expected = []
    for row, key in enumerate(rows):
        with adapt.using(model, key):
            expected.append(model(input_ids=ids[row : row + 1]).logits[0])
    with adapt.using(model, rows), torch.no_grad():
        same(model(input_ids=ids).logits, torch.stack(expected))
        first = model(input_ids=ids[:, :6], use_cache=True)
        last = model(input_ids=ids[:, 6:], past_key_values=first.past_key_values).logits
        same(torch.cat((first.logits, last), 1), torch.stack(expected))


@pytest.mark.parametrize("given", ["past_key_values", "cache"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_the_past_by_the_name_it_had_before(name, given):
    model = MODELS[name]()
    if given not in inspect.signature(model.base_model.forward).parameters and given == "cache":
        pytest.skip("this version of transformers has no argument `cache`")
    shake(adapt.apply(model, METHODS["plain"][0]))
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
        cache = DynamicCache(config=model.config)
        parts = [model(input_ids=part, **{given: cache}).logits for part in (IDS[:, :4], IDS[:, 4:])]
        same(torch.cat(parts, 1), whole)
        cache = DynamicCache(config=model.config)
        states = [model.base_model(part, **{given: cache})[0] for part in (IDS[:, :4], IDS[:, 4:])]
        same(torch.cat(states, 1), model.base_model(IDS)[0])


@pytest.mark.parametrize("name", MODELS)
def test_it_leaves_no_trace(name):
    model = MODELS[name]()
    before, keys = model(input_ids=IDS).logits, list(model.state_dict())
    shake(adapt.apply(model, METHODS["mlp"][0]))
    assert isinstance(model.before, Prefaces)
    twin = copy.deepcopy(model)
    tuned = model(input_ids=IDS).logits
    assert not torch.allclose(tuned, before)
    with adapt.disabled(model):
        assert torch.equal(model(input_ids=IDS).logits, before)
        same(twin(input_ids=IDS).logits, tuned)
    adapt.remove(model)
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert list(model.state_dict()) == keys
    same(twin(input_ids=IDS).logits, tuned)


@torch.no_grad()
def test_training_begins_at_real_words_before_the_text():
    for build in MODELS.values():
        for method in (PrefixTuning(4, hidden=6), PromptTuning(4)):
            model = build()
            words = torch.randint(61, (4,), generator=torch.Generator().manual_seed(3))
            expected = model(input_ids=torch.cat((words.expand(2, -1), IDS), 1)).logits[:, 4:]
            adapt.apply(model, method, generator=torch.Generator().manual_seed(3))
            same(model(input_ids=IDS).logits, expected)


def test_models_that_cannot_are_named():
    with pytest.raises(VolvelleError, match="prefix tuning: Sequential is no decoder"):
        adapt.apply(torch.nn.Sequential(torch.nn.Linear(2, 2)), PrefixTuning())
    model = llama()
    adapt.apply(model, PrefixTuning(3))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(VolvelleError, match="attention 'flash_attention_2' has others"):
        model(input_ids=IDS)
    model = llama().train()
    adapt.apply(model, PrefixTuning(3))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(VolvelleError, match="reentrant checkpointing hides"):
        model(input_ids=IDS)
