"""Drafting with some of the target's own layers: which ones run, over which keys, without a copy of the weights."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from tests.adapt.prefix_models import shake
from tests.decode.helpers import Sometimes, bart, decoder, late
from tests.decode.test_drafts import PROMPTS

from volvelle.adapt import LoRA, PrefixTuning, PromptTuning, apply, using
from volvelle.decode import EarlyExit, Sampling, generate, generate_batch
from volvelle.decode.contract import ALWAYS
from volvelle.decode.drafters.early_exit import Part
from volvelle.decode.loop import reader
from volvelle.decode.request import Limits, Request
from volvelle.errors import UsageError
from volvelle.systems.language import config as c
from volvelle.systems.language.projections import fuse_projections


def prefixed(method):
    model = decoder(7, depth=3)
    shake(apply(model, method))
    return model.eval()


MODELS = {
    "rope": lambda: decoder(depth=3),
    "shaw": lambda: decoder(depth=3, position=c.Shaw()),
    "linear": lambda: decoder(depth=3, attention=c.LinearAttention(chunk=4)),
    "prefix": lambda: prefixed(PrefixTuning(length=3, hidden=None, init="random")),
    "prompt": lambda: prefixed(PromptTuning(length=3, init="random")),
    "lora": lambda: prefixed(LoRA(rank=2)),
    "bart": lambda: bart(depth=3),
}


def weaker(model, layers):
    """Make the other layers do little, so that the draft is often right."""
    blocks = model.model.decoder.layers if hasattr(model.model, "decoder") else model.model.layers
    with torch.no_grad():
        for index, block in enumerate(blocks):
            if index not in layers:
                for name, parameter in block.named_parameters():
                    if "o_proj" in name or "down_proj" in name or "out_proj" in name or "fc2" in name:
                        parameter.mul_(0.05)
    return model


@pytest.mark.parametrize("layers", [(0, 1), (0, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_are_the_plain_ones(name, layers):
    if name == "linear" and layers != (0, 1):
        with pytest.raises(UsageError, match="only the last layers can be left out"):
            generate(MODELS[name](), PROMPTS[0], max_tokens=9, drafter=EarlyExit(layers))
        return
    model = weaker(MODELS[name](), layers)
    free = [answer.tokens for answer in generate_batch(model, PROMPTS, max_tokens=24)]
    eos = [late(free, 5)]
    plain = generate_batch(model, PROMPTS, max_tokens=24, eos_ids=eos)
    drafted = generate_batch(
        model, PROMPTS, max_tokens=24, eos_ids=eos, drafter=EarlyExit(layers, 3), policy=Sometimes()
    )
    assert [answer.tokens for answer in drafted] == [answer.tokens for answer in plain]
    if name != "bart":
        assert sum(sum(answer.accepted) for answer in drafted) > 0


@pytest.mark.parametrize("layers", [(0,), (0, 1), (1, 2), (0, 2)])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_part_is_the_model_with_only_those_layers(name, layers):
    """Over its cache, joined projections or not, with what comes before the texts."""
    if name == "linear" and layers[-1] >= len(layers):
        return
    model = MODELS[name]()
    fewer = copy.deepcopy(model)
    stack = fewer.model.decoder if name == "bart" else fewer.model
    ids = torch.tensor([[5, 17, 3, 28, 41, 7], [9, 9, 9, 1, 2, 3]])
    requests = [Request(model, row, Sampling(), Limits(20, (), ())) for row in ids.tolist()]
    mine = Part(reader(model, requests), layers)
    if name in ("prefix", "prompt"):
        states = fewer.before(fewer, 1, "decoder").states[list(layers)]
        chosen = copy.deepcopy(fewer)
        chosen._modules["before"] = None
        chosen.model.layers = torch.nn.ModuleList(chosen.model.layers[i] for i in layers)
        expected = with_keys(chosen, ids, states)
    else:
        stack.layers = torch.nn.ModuleList(stack.layers[i] for i in layers)
        own = reader(fewer, requests)
        expected = own.logits(own.hidden(ids))
    for fused in (False, True):
        if fused and name != "bart":
            fuse_projections(model)
        cache, found = mine.new_cache(2, 8), []
        for part in ids.split([3, 1, 2], 1):
            found.append(mine.logits(mine.hidden(part, cache=cache)))
            cache.commit()
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-9)


def with_keys(model, ids, states):
    """Logits of `model` behind given keys and values, which its layers see by their new numbers."""
    from volvelle.parts.attention.before import Before

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.index = index
    model.config = dataclasses.replace(model.config, depth=len(model.model.layers))
    cache = model.new_cache(2, ids.shape[1] + states.shape[4])
    Before(states).fill(cache)
    return model(ids, cache=cache).logits


def test_no_weight_is_copied_and_the_target_keeps_its_fast_path():
    model = decoder(depth=3)
    fuse_projections(model)
    straight, places = model.model.straight, [parameter.data_ptr() for parameter in model.parameters()]
    assert straight is not None
    generate(model, PROMPTS[0], max_tokens=10, drafter=EarlyExit(2, 3))
    assert model.model.straight is straight
    assert [parameter.data_ptr() for parameter in model.parameters()] == places


def test_sampled_answers_and_rows_with_adapters_of_their_own():
    model = decoder(7, depth=3)
    for name in ("one", "two"):
        shake(apply(model, LoRA(rank=2), name=name), seed=ord(name[0]))
    with using(model, ["one", None, "two"]):
        plain = generate_batch(model, PROMPTS[:3], max_tokens=20)
        drafted = generate_batch(model, PROMPTS[:3], max_tokens=20, drafter=EarlyExit(2, 3), policy=ALWAYS)
    assert [answer.tokens for answer in drafted] == [answer.tokens for answer in plain]
    drafter = EarlyExit(2, 3)
    answer = generate(model, PROMPTS[0], sampling=Sampling(1.0, seed=0), max_tokens=20, drafter=drafter)
    assert len(answer.tokens) == 20


def test_layers_that_are_no_part_are_refused():
    for layers in ((), 0, (1, 0), (-1,), (1, 1)):
        with pytest.raises(UsageError, match="rising numbers"):
            EarlyExit(layers)
    for layers in (2, (0, 1), (0, 5)):
        with pytest.raises(UsageError, match="not a part of the target's 0 to 1"):
            generate(decoder(), PROMPTS[0], max_tokens=9, drafter=EarlyExit(layers))
