"""The claims on drafters: decoding in turn, heads trained on a model's own answers, and (slow) the quick budget."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.decode.conftest import Letters
from tests.systems.language.test_decoder import LLAMA, build

from volvelle.claims import medusa, mtp
from volvelle.claims.draft_runs import decode_in_turn, decoding_findings, same_answers, step_costs
from volvelle.decode.drafters.medusa import Medusa
from volvelle.systems.language.medusa import MedusaHeads

PROMPTS = [[5, 9, 2], [8, 1, 4, 4], [3, 3]]


@pytest.fixture
def model():
    model = build(LLAMA).double()
    model.tokenizer = Letters()
    return model


def test_answers_in_turn(model):
    heads = MedusaHeads.of(model, 2).double().eval()
    found = decode_in_turn(model, Medusa(heads, k=5), PROMPTS, max_tokens=12, rounds=3)
    assert (len(found.ratios), found.answers, found.flips) == (3, 3, 0)
    assert 1 <= found.per_step <= 3
    assert all(0 <= share <= 1 for share in found.kept)
    costs = step_costs(model, [6], length=8, rounds=1)
    assert set(costs) == {6}
    findings = decoding_findings("heads", found, 2.0, 5)
    assert findings[-1].value == pytest.approx(found.per_step / 2)
    assert same_answers("heads", found, "fp64").held


def test_heads_are_trained_on_the_models_own_answers(model):
    prompts = [[i % 60 + 1, i % 7 + 1, 5] for i in range(40)]
    size = {"prompts": 24, "tokens": 10, "steps": 30, "vocabulary": 30, "asked": 2, "rounds": 1}
    small = model.float()
    before = copy.deepcopy(small.state_dict())
    heads, held = medusa.train(small, prompts, size, "fp32")
    assert heads.tokens is not None
    assert len(heads.tokens) == 30
    assert heads.acceptance is not None
    assert heads.acceptance.shape[0] == medusa.HEADS
    assert 0 <= held["token_2_accuracy"] <= held["token_2_top5"] <= 1
    assert any(bool(p.any()) for p in heads.parameters())
    assert all(torch.equal(before[name], p) for name, p in small.state_dict().items())


@pytest.mark.parametrize("kind", ["sequential", "parallel"])
def test_small_models_decode_with_their_modules(kind):
    train, held = mtp.corpus()
    first = {}
    mtp.run(kind, train, held, 0, mtp.SIZES["quick"] | {"steps": 10}, first)
    findings = mtp.decoding(kind, first[kind], held)
    assert [f.held for f in findings if "differ" in f.what] == [True]
    assert any("speed-up" in f.what for f in findings)


@pytest.mark.slow
def test_the_quick_budget():
    found = medusa.measure("quick")
    assert found.verdict != "not measurable here" or found.unmeasurable
