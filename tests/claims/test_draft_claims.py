"""The claims speculative and prompt-lookup on a random model: every figure is one, and the right ones are judged."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from volvelle.claims import decode_runs, prompt_lookup, speculative
from volvelle.claims.decode_runs import Compared, DraftBench, Fixed
from volvelle.decode.accept_exact import Exact
from volvelle.decode.contract import Drafted
from volvelle.decode.drafters.prompt_lookup import PromptLookup
from volvelle.decode.request import Generation
from volvelle.errors import VolvelleError
from volvelle.systems.language.config import GatedMLP, LanguageConfig, RMSNorm, Rope
from volvelle.systems.language.decoder import Decoder


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The claims with a random model of four layers in SmolLM2's place."""
    torch.manual_seed(0)
    config = LanguageConfig(
        "llama", vocabulary=64, width=16, depth=4, heads=2, context=256, norm=RMSNorm(), mlp=GatedMLP(32),
        position=Rope(),
    )  # fmt: skip
    model = Decoder(config).eval()

    def bench(prompts, tokens, rounds):
        ids = {name: [ord(letter) % 64 for letter in text][:40] for name, text in prompts.items()}
        return DraftBench(model, ids, tokens, rounds, {"dtype": str(model.dtype)})

    monkeypatch.setattr(decode_runs, "open_bench", bench)
    monkeypatch.setattr(prompt_lookup, "SIZES", {"quick": (2, 1, 12, 2)})
    monkeypatch.setattr(speculative, "SIZES", {"quick": (2, 12, 2, (1, 2), (1, 3))})
    monkeypatch.chdir(tmp_path)
    return bench({"a": "one two one two", "b": "three"}, 12, 1)


@pytest.mark.parametrize("claim", [prompt_lookup, speculative])
def test_measures_what_it_says(claim, small):
    found = claim.measure("quick")
    assert found.verdict in ("held", "not held")
    assert len({finding.what for finding in found.findings}) == len(found.findings)
    assert all(finding.value == finding.value for finding in found.findings)
    [equal] = [f for f in found.findings if "answers that differ from plain ones in fp32" in f.what]
    assert equal.value == 0
    assert equal.held
    bounds = [f for f in found.findings if "speed-up" in f.what and f.bound]
    assert {f.bound for f in bounds} == {">= 2", ">= 0.97"}


@pytest.mark.parametrize("claim", [prompt_lookup, speculative])
def test_without_a_model_nothing_is_claimed(claim, monkeypatch):
    def missing(prompts, tokens, rounds):
        raise VolvelleError("no network")

    monkeypatch.setattr(decode_runs, "open_bench", missing)
    assert claim.measure("quick").verdict == "not measurable here"


def answer(tokens, proposed=(), accepted=()) -> Generation:
    return Generation([*tokens], "", "length", 3, 4, 1.0, 0.1, proposed=[*proposed], accepted=[*accepted])


def test_acceptance_is_that_of_tokens_behind_kept_ones():
    found = Compared(
        [1.0, 3.0], [answer([1, 2]), answer([1])], [answer([1, 2], (4, 4), (2, 1)), answer([5], (2,), (1,))]
    )
    found.drafted[0] = dataclasses.replace(found.drafted[0], near_ties=3)
    assert found.acceptance == pytest.approx((2 + 1 + 1) / (4 + 2 + 2))
    assert found.kept == pytest.approx([3 / 6, 1 / 4])
    assert found.kept_a_draft == pytest.approx(4 / 6)
    assert found.differing == 1
    assert found.per_step == pytest.approx(1 / 6)
    assert found.plain_seconds == pytest.approx(2 * (1.0 - 0.1))
    assert found.near_ties == 3
    assert found.speed_up == 2.0
    assert found.spread == (1.0, 3.0)


def test_a_drafter_that_changes_answers_is_found(small, monkeypatch):
    class Shifted(Exact):
        def __call__(self, logits, draft, requests):
            return super().__call__(logits.roll(1, -1), draft, requests)

    real = decode_runs.generate

    def wrong(*words, drafter, **options):
        return real(*words, drafter=drafter, **options, **({} if drafter is None else {"acceptance": Shifted()}))

    drafter = PromptLookup(n=1, k=3)
    assert small.identical("lookup", drafter, 12, ["a", "b"]).held
    monkeypatch.setattr(decode_runs, "generate", wrong)
    assert not small.identical("lookup", drafter, 12, ["a", "b"]).held


def test_fixed_lengths_and_their_times():
    fixed = Fixed(4)
    assert fixed.begin().choose(9, 50) == 4
    assert fixed.choose(2, 50) == 2
    for _ in range(2):
        fixed.observe(50, None, step_seconds=1.0)
        fixed.observe(50, Drafted(4, None, [[0]]), step_seconds=2.0, draft_seconds=0.5)
    assert fixed.steps.ratios(1) == {1: 1.0, 5: 2.0}
    assert fixed.drafts.seconds(4, 1) == 0.5


def test_lookups_cost_the_same_for_every_token():
    assert prompt_lookup.looked_at(PromptLookup(n=3)) <= 12
    assert prompt_lookup.looked_at(PromptLookup(n=6)) > prompt_lookup.looked_at(PromptLookup(n=3))
