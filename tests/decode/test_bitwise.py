"""Exact to the bit: drafts, good and bad, change no token and no logit, in any dtype."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from volvelle.decode.bitwise import AnyWidth, FixedWidth, bitwise
from volvelle.decode.contract import ALWAYS, Draft, Drafter, Drafting
from volvelle.decode.drafters.ngram import NGram
from volvelle.decode.generation import GREEDY, generate, limits
from volvelle.decode.loop import begin, step
from volvelle.decode.options import Rules
from volvelle.decode.request import Request
from volvelle.decode.speculation import Help, first_path
from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.language import config as c
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.native.library import library
from volvelle.systems.language.projections import fuse_projections
from volvelle.systems.language.quantized import quantize_model
from volvelle.systems.modes import evaluating

SMALL = c.LanguageConfig(
    "llama", vocabulary=96, width=64, depth=2, heads=4, context=160, norm=c.RMSNorm(), mlp=c.GatedMLP(96),
    position=c.Rope(), kv_heads=2, init_std=0.3,
)  # fmt: skip
PROMPT = [5, 17, 3, 80, 41, 9, 2]


class Adversary(Drafter):
    """Knows the answer, and draws how much of it to tell before it lies."""

    def __init__(self, answer, seed, width=6, high=90):
        self.answer, self.seed, self.width, self.high = answer, seed, width, high

    def begin(self, writer, requests, room):
        return _Lying(self.answer, torch.Generator().manual_seed(self.seed), self.width, self.high)


class _Lying(Drafting):
    def __init__(self, answer, generator, width, high):
        self.answer, self.generator, self.width, self.high = answer, generator, width, high

    def draw(self, high):
        return int(torch.randint(high, (), generator=self.generator))

    def propose(self, requests, seen, k):
        at, size, true = len(requests[0].tokens), 1 + self.draw(k), self.draw(k + 1)
        told = [*self.answer[at : at + min(size, true)]]
        return Draft(torch.tensor([[*told, *(self.draw(self.high) for _ in range(size - len(told)))]]))


def small(precision):
    torch.manual_seed(0)
    model = Decoder(SMALL).eval()
    if precision != "fp32":
        model.to(torch.bfloat16)
    if precision.startswith("int"):
        quantize_model(model, precision)
    return model


def answer(model, drafter=None, prompt=PROMPT, tokens=60, make=bitwise):
    """Tokens, and for each the bits of the logits that it was chosen from."""
    request = Request(model, prompt, GREEDY, limits(tokens, (), (), Rules()))
    forward, spare = make(model, [request])
    chosen = []

    def noting(writer, cache, ids, mask, n, *read):
        logits, states = forward(writer, cache, ids, mask, n, *read)
        chosen.append((cache.length, logits[0].clone()))
        return logits, states

    with evaluating(model):
        for _ in begin(model, [request], help=None if drafter is None else Help(drafter), forward=noting, spare=spare):
            pass
    # a position is scored anew after a rejected draft: the last time counts
    scores = {start + i: row for start, logits in chosen[1:] for i, row in enumerate(logits)}
    start = len(request.prompt)  # an encoder-decoder's is its start token
    return request.tokens, [scores[start + i] for i in range(len(request.tokens) - 1)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("compiled", [False, True])
def test_drafts_change_no_bit(precision, compiled):
    model = small(precision)
    if compiled:
        if library() is None:
            pytest.skip("no compiled step on this machine")
        fuse_projections(model)
    tokens, logits = answer(model)
    assert len(set(tokens)) > 5  # an answer worth the name
    for seed in range(4):
        found, scores = answer(model, Adversary(tokens, seed))
        assert found == tokens
        assert all(torch.equal(a, b) for a, b in zip(scores, logits, strict=True))


@torch.no_grad()
def test_a_head_that_is_not_compiled_or_has_changed_is_noticed():
    torch.manual_seed(0)
    model = Decoder(dataclasses.replace(SMALL, vocabulary=93)).eval()  # does not divide by 16
    fuse_projections(model)
    request = Request(model, PROMPT, GREEDY, limits(20, (), (), Rules()))
    assert isinstance(bitwise(model, [request])[0], FixedWidth)
    tokens, logits = answer(model)
    found, scores = answer(model, Adversary(tokens, 1))
    assert found == tokens
    assert all(torch.equal(a, b) for a, b in zip(scores, logits, strict=True))
    other = small("fp32")
    fuse_projections(other)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        hidden = other.hidden(ids)
        before = other.logits(hidden)
        other.lm_head = nn.Linear(64, 96)
        torch.testing.assert_close(other.logits(hidden), other.lm_head(hidden))
        assert not torch.allclose(before, other.logits(hidden))


def test_answers_of_an_encoder_decoder():
    from tests.systems.language.test_encoder_decoder import make_model

    model = make_model(dtype=torch.float32, context=64)
    tokens, logits = answer(model, prompt=[5, 7, 9, 11], tokens=20)
    found, scores = answer(
        model, Adversary([token % 61 for token in tokens], 2, high=60), prompt=[5, 7, 9, 11], tokens=20
    )
    assert found == tokens
    assert all(torch.equal(a, b) for a, b in zip(scores, logits, strict=True))


def test_steps_as_they_come_do_differ():
    # Without this the tests above would pass for any way of computing steps.
    model = small("fp32")
    _, plain = answer(model, make=lambda *_: (step, 0))
    tokens, _ = answer(model)
    _, drafted = answer(model, Adversary(tokens, 0), make=lambda *_: (step, 0))
    assert not all(torch.equal(a, b) for a, b in zip(plain, drafted, strict=True))


def test_which_way_is_taken_and_what_it_needs():
    model = small("fp32")
    request = Request(model, PROMPT, GREEDY, limits(20, (), (), Rules()))
    forward, spare = bitwise(model, [request])
    assert isinstance(forward, FixedWidth)
    assert (forward.reach, spare) == (len(PROMPT) + 20 + 16, 16)
    with pytest.raises(UsageError, match="one text at a time, got 2"):
        bitwise(model, [request, request])
    long = Request(model, PROMPT, GREEDY, limits(150, (), (), Rules()))
    with pytest.raises(VolvelleError, match="may take 144 of the context of 160") as error:
        bitwise(model, [long])
    assert error.value.tip == f"max_tokens={144 - len(PROMPT)}"
    for prompt, tokens, tip in (
        (146, 4, "shorten the prompt to 140 tokens"),
        (144, 16, "shorten the prompt to 128 tokens"),
        (143, 16, "max_tokens=1"),
    ):
        with pytest.raises(VolvelleError) as error:
            bitwise(model, [Request(model, [1] * prompt, GREEDY, limits(tokens, (), (), Rules()))])
        assert error.value.tip == tip
    if library() is not None:
        fuse_projections(model)
        assert isinstance(bitwise(model, [long])[0], AnyWidth)


@pytest.mark.parametrize("compiled", [False, True])
def test_of_trees_and_wide_drafts_the_first_path_is_checked(compiled):
    model = small("fp32")
    if compiled:
        fuse_projections(model)
    options: dict[str, Any] = {"max_tokens": 100, "eos_ids": (), "exact": "bitwise"}
    plain = generate(model, PROMPT, **options)
    for drafter in (NGram([plain.tokens], k=60), Adversary(plain.tokens, 3, width=60)):
        found = generate(model, PROMPT, drafter=drafter, policy=ALWAYS, **options)
        assert found.tokens == plain.tokens
        assert found.steps < 60


def test_the_first_path_of_a_tree():
    tree = Draft(torch.arange(6)[None], (-1, -1, 0, 1, 2, 0), chances=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    found = first_path(tree, 5)
    assert (found.tokens.tolist(), found.parents, found.chances) == ([[0, 2, 4]], None, [0.9, 0.7, 0.5])
    assert first_path(tree, 2).tokens.tolist() == [[0, 2]]
    assert first_path(Draft(torch.arange(4)[None]), 3).tokens.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_steps_themselves_refuse_trees_and_width(compiled):
    model = small("fp32")
    if compiled:
        fuse_projections(model)

    class Tree(Drafter):
        def begin(self, writer, requests, room):
            return _Tree()

    class _Tree(Drafting):
        width = 2

        def propose(self, requests, seen, k):
            return Draft(torch.tensor([[1, 2]]), (-1, -1))

    with pytest.raises(VolvelleError, match="drafts trees"):
        answer(model, Tree())
    with pytest.raises(VolvelleError, match=r"takes steps of (16|32) tokens"):
        answer(model, Adversary([1] * 200, 3, width=60), tokens=100)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("compiled", [False, True])
def test_drafts_change_no_bit_of_a_real_model(precision, compiled):
    from volvelle import hub
    from volvelle.systems.language.load import load_language_model

    try:
        path = hub.fetch("smollm2")
    except VolvelleError as error:
        pytest.skip(f"smollm2 cannot be fetched: {error}")
    if precision == "int4":
        model = load_language_model(path, precision="int4")
    else:
        model = load_language_model(path, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    if compiled:
        fuse_projections(model)
    prompt = model.tokenizer.chat_ids([{"role": "user", "content": "Write a Python function that adds two numbers."}])
    tokens, logits = answer(model, prompt=prompt, tokens=48)
    for seed in range(2):
        found, scores = answer(model, Adversary(tokens, seed), prompt=prompt, tokens=48)
        assert found == tokens
        assert all(torch.equal(a, b) for a, b in zip(scores, logits, strict=True))
