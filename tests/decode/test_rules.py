"""Rules on answers: against transformers' processors, and each by what it promises."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.decode.helpers import decoder

from volvelle.decode import DraftModel, Rules, Sampling, generate, generate_batch
from volvelle.decode.contract import ALWAYS
from volvelle.decode.rules import completions, constrain
from volvelle.errors import UsageError, VolvelleError


@pytest.mark.peer
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_repeated_ngrams_equal_transformers(n):
    processor = pytest.importorskip("transformers").NoRepeatNGramLogitsProcessor(n)
    draw = torch.Generator().manual_seed(n)
    for length in (1, 2, 3, 8, 30, 30, 30):
        tokens = torch.randint(0, 4, (1, length), generator=draw)
        theirs = processor(tokens, torch.zeros(1, 6))[0]
        ours = constrain(
            torch.zeros(6), tokens[0, :1].tolist(), tokens[0, 1:].tolist(), Rules(no_repeat_ngram_size=n), eos=(),
            max_tokens=99,
        )  # fmt: skip
        assert torch.equal(ours, theirs)


def test_completions_by_their_definition():
    tokens = [1, 2, 1, 2, 3, 1, 2]
    assert completions(tokens, 3) == {1, 3}
    assert completions(tokens, 2) == {1, 3}
    assert completions(tokens, 1) == {1, 2, 3}
    assert completions(tokens, 8) == completions([], 2) == set()


def test_scores_are_left_alone_where_no_rule_binds():
    scores = torch.randn(5)
    rules = Rules(min_tokens=2, forced_first=3, forced_last=1)
    kept = scores.clone()
    assert constrain(scores, [0], [3, 4], rules, eos=(1,), max_tokens=9) is scores
    assert not rules.bind(2, 9)
    early = constrain(scores, [0], [3], rules, eos=(1, 2), max_tokens=9)
    assert (early == -math.inf).tolist() == [False, True, True, False, False]
    assert torch.equal(early[[0, 3, 4]], scores[[0, 3, 4]])
    assert torch.equal(scores, kept), "the given scores are not written to"


def test_a_forced_token_is_certain():
    rules = Rules(forced_first=3, forced_last=1)
    for written, forced in ((0, 3), (8, 1)):
        scores = constrain(torch.randn(5), [0], [2] * written, rules, eos=(1,), max_tokens=9)
        assert scores.softmax(0).tolist() == [float(token == forced) for token in range(5)]
    # of one token the last rule has the last word, as in transformers
    assert int(constrain(torch.randn(5), [0], [], rules, eos=(1,), max_tokens=1).argmax()) == 1


PROMPTS = [[5, 17, 3, 88, 41], [9], [60, 61, 62, 63, 64, 65, 66]]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, seed=1), Sampling(repetition_penalty=1.2)])
def test_answers_keep_the_rules(model, sampling):
    free = generate_batch(model, PROMPTS, sampling=sampling, max_tokens=30)
    eos = [free[0].tokens[2], free[2].tokens[4]]
    rules = Rules(min_tokens=12, no_repeat_ngram_size=2, forced_first=7, forced_last=11)
    answers = generate_batch(model, PROMPTS, sampling=sampling, max_tokens=30, eos_ids=eos, rules=rules)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.tokens[0] == 7
        assert len(answer.tokens) >= 12
        assert answer.finish == "eos" or answer.tokens[-1] == 11
        text = [*prompt, *answer.tokens[:-1]]
        pairs = list(itertools.pairwise(text))
        assert len(set(pairs)) == len(pairs)
    assert [a.tokens for a in answers] != [a.tokens for a in free]


def test_no_rules_change_nothing(model):
    assert (
        generate(model, PROMPTS[0], max_tokens=9, rules=Rules()).tokens
        == generate(model, PROMPTS[0], max_tokens=9).tokens
    )


def test_wrong_rules_are_named(model):
    with pytest.raises(UsageError, match=r"rules.min_tokens must not be negative, got -1"):
        Rules(min_tokens=-1)
    with pytest.raises(UsageError, match=r"rules.forced_first = 96 is outside the model's vocabulary of 96"):
        generate(model, PROMPTS[0], rules=Rules(forced_first=96))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=0), Sampling(repetition_penalty=1.2)])
@pytest.mark.parametrize("prompts", [[[5, 17, 3]], [[5, 17, 3], [9]]], ids=len)
def test_rules_that_leave_no_token_end_with_an_error(sampling, prompts):
    model, small = decoder(vocabulary=20), decoder(1, vocabulary=20)
    rules = Rules(no_repeat_ngram_size=1)
    for help in ({}, {"drafter": DraftModel(small, 3), "policy": ALWAYS}):
        options = {"sampling": sampling, "rules": rules, "eos_ids": (), **help}
        answers = generate_batch(model, prompts, max_tokens=17, **options)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert len({*prompt, *answer.tokens}) == len(prompt) + 17
        with pytest.raises(VolvelleError, match="the rules leave no token") as error:
            generate_batch(model, prompts, max_tokens=18, **options)
        assert "no_repeat_ngram_size" in str(error.value.tip)
