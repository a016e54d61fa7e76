"""The claims on drafters: decoding in turn, heads trained on a model's own answers, and (slow) the quick budget."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.decode.conftest import Letters
from tests.decode.helpers import decoder
from tests.systems.language.test_decoder import LLAMA, build

from volvelle.claims import decode_runs, medusa, mtp, ngram, own_answers
from volvelle.claims.decode_runs import compare, decoding_findings, same_answers, step_costs
from volvelle.decode.accept_exact import Exact, as_accepted, children_of
from volvelle.decode.drafters.medusa import Medusa
from volvelle.systems.language.medusa import MedusaHeads

PROMPTS = [[5, 9, 2], [8, 1, 4, 4], [3, 3]]
SIZE = {"prompts": 24, "tokens": 10, "steps": 30, "vocabulary": 30, "asked": 2, "rounds": 1}


@pytest.fixture
def model():
    model = build(LLAMA).double()
    model.tokenizer = Letters()
    return model


@pytest.fixture
def believe(monkeypatch):
    """Called: from then on the claims' answers hold whatever is drafted first, right or wrong."""

    class Always(Exact):
        def __call__(self, logits, draft, requests):
            children, walks = children_of(draft), {}
            for row in (row for row, request in enumerate(requests) if request.finish is None):
                nodes = [0]
                while children[nodes[-1]]:
                    nodes.append(children[nodes[-1]][0])
                walks[row] = nodes, int(logits[row, nodes[-1]].argmax())
            return as_accepted(walks, len(requests), draft.tokens.tolist(), logits.device)

    real = decode_runs.generate
    return lambda: monkeypatch.setattr(
        decode_runs, "generate", lambda *words, **options: real(*words, **options, acceptance=Always())
    )


def differing(findings) -> list[bool | None]:
    """What became of the findings on answers that differ."""
    return [f.held for f in findings if "answers that differ" in f.what]


def test_answers_in_turn(model):
    heads = MedusaHeads.of(model, 2).double().eval()
    found = compare(model, Medusa(heads, k=5), PROMPTS, max_tokens=12, rounds=3)
    assert (len(found.ratios), len(found.plain), len(found.drafted), found.differing) == (3, 3, 3, 0)
    assert 1 <= found.per_step <= 3
    assert all(0 <= share <= 1 for share in found.kept)
    costs = step_costs(model, [6], length=8, rounds=1)
    assert set(costs) == {6}
    findings = decoding_findings("heads", found, 2.0, 5)
    assert findings[-1].value == pytest.approx(found.per_step / 2)
    assert same_answers("heads", found, "fp64").held


def test_heads_are_trained_on_the_models_own_answers(model):
    prompts = [[i % 60 + 1, i % 7 + 1, 5] for i in range(40)]
    small = model.float()
    before = copy.deepcopy(small.state_dict())
    heads, held = medusa.train(small, prompts, SIZE, "fp32")
    assert heads.tokens is not None
    assert len(heads.tokens) == 30
    assert heads.acceptance is not None
    assert heads.acceptance.shape[0] == medusa.HEADS
    assert 0 <= held["token_2_accuracy"] <= held["token_2_top5"] <= 1
    assert any(bool(p.any()) for p in heads.parameters())
    assert all(torch.equal(before[name], p) for name, p in small.state_dict().items())


@pytest.mark.parametrize("kind", ["sequential", "parallel"])
def test_small_models_decode_with_their_modules(kind, monkeypatch, believe):
    monkeypatch.setattr(mtp, "ANSWERS", 2)
    train, held = mtp.corpus()
    first = {}
    mtp.run(kind, train, held, 0, mtp.SIZES["quick"] | {"steps": 10}, first)
    findings = mtp.decoding(kind, first[kind], held)
    assert differing(findings) == [True]
    assert any("speed-up" in f.what for f in findings)
    with torch.no_grad():  # so few steps teach to write spaces only, which both do: now they draft what is wrong
        for p in first[kind].mtp.parameters():
            p.normal_()
    assert differing(mtp.decoding(kind, first[kind], held)) == [True]
    believe()
    assert differing(mtp.decoding(kind, first[kind], held)) == [False]


def test_heads_that_are_always_believed_are_found(monkeypatch, believe):
    model = decoder(context=256).float()
    model.tokenizer = Letters()
    prompts = [[i % 12 + 1, i % 7 + 1, 5] for i in range(40)]
    monkeypatch.setattr(decode_runs, "smollm2", lambda dtype=None: model)
    monkeypatch.setattr(
        own_answers, "ask", lambda model, count, asked: (prompts[medusa.HELD :], [*prompts[: medusa.HELD], *PROMPTS])
    )
    monkeypatch.setitem(medusa.SIZES, "quick", SIZE)
    assert differing(medusa.measure("quick").findings) == [True]
    believe()
    assert differing(medusa.measure("quick").findings) == [False]


def test_counted_answers_draft_and_the_believed_ones_are_found(monkeypatch, believe):
    model = decoder(context=256).float()
    model.tokenizer = Letters()
    prompts = [[i % 12 + 1, i % 7 + 1, 5] for i in range(6)]
    monkeypatch.setattr(decode_runs, "smollm2", lambda dtype=None: model)
    monkeypatch.setattr(own_answers, "ask", lambda model, count, asked: (prompts, prompts[:3]))
    monkeypatch.setitem(ngram.SIZES, "quick", {"answers": 6, "tokens": 12, "asked": 3, "rounds": 2})
    found = ngram.measure("quick")
    figures = {finding.what: finding for finding in found.findings}
    assert len(figures) == len(found.findings)
    gained = [figures[f"{who}: tokens gained by a step"].value for who in ("own text alone", "6 earlier answers too")]
    assert gained[1] >= gained[0] >= 1
    assert differing(found.findings)[-1] is True
    believe()
    assert differing(ngram.measure("quick").findings)[-1] is False


@pytest.mark.slow
@pytest.mark.parametrize("claim", [medusa, ngram])
def test_the_quick_budget(claim):
    found = claim.measure("quick")
    if found.unmeasurable:
        pytest.skip(found.unmeasurable)
    assert differing(found.findings)[-1] is True
