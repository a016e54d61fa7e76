"""Several drafters as one: each drafts what it would alone, and answers stay what they are."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.decode.drafters.test_trained_drafters import (
    DRAFTERS,
    PROMPTS,
    EveryThird,
    Listening,
    exact_model,
    rows_heard,
)  # fmt: skip

from volvelle.decode import FirstOf, NGram, PromptLookup, generate, generate_batch
from volvelle.decode.contract import ALWAYS, Draft, Drafter, Drafting, Pacing, Policy
from volvelle.errors import UsageError

__all__ = ["exact_model"]


class NowAndThen(Drafter):
    """A drafter with a wrong guess in two calls of three."""

    def begin(self, writer, requests, room):
        class Run(Drafting):
            width, count, told = 2, itertools.count(), []

            def propose(self, requests, seen, k):
                drafts = next(self.count) % 3 < 2
                return Draft(torch.full((len(requests), min(k, 2)), 1)) if drafts else None

            def observe(self, requests, accepted, draft):
                self.told.append(draft is not None)

        self.run = Run()
        return self.run


@pytest.mark.parametrize("name", ["grown tree", "sequential", "parallel"])
@pytest.mark.parametrize("policy", [ALWAYS, EveryThird()], ids=["always", "every third"])
def test_the_second_drafts_what_it_drafts_alone(name, policy, exact_model):
    second, first = Listening(DRAFTERS[name](exact_model)), NowAndThen()
    options = {"max_tokens": 24, "eos_ids": ()}
    for prompt in PROMPTS[:2]:
        second.heard.clear()
        generate(exact_model, prompt, **options, drafter=second, policy=ALWAYS)
        alone = {tuple(text): tokens for text, tokens, _ in rows_heard(second)}
        second.heard.clear()
        found = generate(exact_model, prompt, **options, drafter=FirstOf(first, second), policy=policy)
        assert found.tokens == generate(exact_model, prompt, **options).tokens
        both = [(alone[tuple(text)], drafted) for text, drafted, _ in rows_heard(second) if tuple(text) in alone]
        assert len(both) >= 2
        if name != "grown tree":  # its shape follows what was accepted so far
            assert all(expected[: len(drafted)] == drafted[: len(expected)] for expected, drafted in both)
        assert set(first.run.told) == {True, False}, "the first drafts in some steps, and hears of the others"


@pytest.mark.parametrize("name", ["grown tree", "sequential", "parallel"])
def test_greedy_answers_of_batches_are_those_without_drafts(name, exact_model):
    plain = generate_batch(exact_model, PROMPTS, max_tokens=30, eos_ids=())
    for first in (PromptLookup(n=3, least=2), NowAndThen()):
        drafter = FirstOf(first, DRAFTERS[name](exact_model))
        for policy in (ALWAYS, EveryThird()):
            found = generate_batch(exact_model, PROMPTS, max_tokens=30, eos_ids=(), drafter=drafter, policy=policy)
            assert [answer.tokens for answer in found] == [answer.tokens for answer in plain]


class Strict(Policy, Pacing):
    """Takes any draft that states its chances, of the others up to two tokens, and in every second step."""

    def __init__(self):
        self.checked, self.count = [], itertools.count()

    def begin(self):
        return self

    def choose(self, limit, length):
        return min(limit, 2) * (next(self.count) % 2)

    def choose_stated(self, limit, length):
        return limit

    def observe(self, length, draft, *, step_seconds, draft_seconds=0.0):
        if draft is not None:
            self.checked.append((draft.k, draft.chances is not None))


def test_a_policy_has_its_say_on_each_kind_of_draft(exact_model):
    """What states its chances is judged when it is there; what does not must be bounded before it is made."""
    asked = []

    class Blind(NowAndThen):
        def begin(self, writer, requests, room):
            run = super().begin(writer, requests, room)
            run.width = 9
            run.propose = lambda requests, seen, k: asked.append(k) or Draft(torch.full((len(requests), k), 1))
            return run

    policy, prompt, options = Strict(), PROMPTS[3], {"max_tokens": 40, "eos_ids": ()}
    found = generate(exact_model, prompt, **options, drafter=FirstOf(NGram(n=2), Blind()), policy=policy)
    assert found.tokens == generate(exact_model, prompt, **options).tokens
    assert asked
    assert set(asked) <= {1, 2}
    assert {stated for _, stated in policy.checked} == {True, False}
    assert max(k for k, stated in policy.checked if stated) > 2


def test_what_does_not_fit_is_refused(exact_model):
    with pytest.raises(UsageError, match="at least one"):
        FirstOf()
    two = FirstOf(DRAFTERS["sequential"](exact_model), DRAFTERS["parallel"](exact_model))
    with pytest.raises(UsageError, match="2 drafters read the target"):
        generate(exact_model, [1, 2], max_tokens=4, drafter=two)
    assert len(two.modules) == 2
