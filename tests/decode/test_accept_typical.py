"""Medusa's threshold: which tokens are kept, which path of a tree, and what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from tests.decode.helpers import Guessing, decoder

from volvelle.decode import Sampling, Typical, generate, generate_batch
from volvelle.decode.contract import ALWAYS, Draft
from volvelle.decode.request import Limits, Request, distributions
from volvelle.errors import UsageError

PROMPT = [5, 17, 3]
WARM = Sampling(temperature=1.0, seed=3)


def judged(p, tokens, parents=None, rule=None):
    """What the rule keeps of one row, given the distribution p (n, v) behind every place."""
    model = decoder(vocabulary=p.shape[1])
    request = Request(model, [1], WARM, Limits(20, (), ()))
    accepted = (rule or Typical())(p.log()[None], Draft(torch.tensor([tokens]), parents), [request])
    return accepted.path.tolist()[0], accepted.tokens[0]


def test_the_threshold_falls_with_the_entropy():
    sure = torch.tensor([[0.9, 0.05, 0.03, 0.02]])
    even = torch.full((1, 4), 0.25)
    rest = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    for p, token, kept in ((sure, 0, True), (sure, 1, False), (even, 3, True)):
        path, tokens = judged(torch.cat((p, rest)), [token])
        assert path == ([0, 1] if kept else [0])
        assert tokens[:-1] == ([token] if kept else [])
        entropy = -sum(x * math.log(x) for x in p[0].tolist())
        assert kept == (float(p[0, token]) > min(0.09, 0.3 * math.exp(-entropy)))
        if kept:
            assert tokens[-1] == 2  # drawn from what the target says behind it
    path, _ = judged(torch.cat((even, rest)), [3], rule=Typical(epsilon=0.5, delta=3.0))
    assert path == [0]
    path, _ = judged(torch.cat((even, rest)), [-1])
    assert path == [0]


def test_the_longest_path_wins_and_of_several_the_likeliest():
    p = torch.full((6, 4), 0.1)
    p[0] = torch.tensor([0.5, 0.3, 0.2, 0.0])  # behind the newest token
    p[1] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    p[2] = torch.tensor([0.4, 0.6, 0.0, 0.0])
    p[3:] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    tokens, parents = [0, 1, 3, 0, 1], (-1, -1, 0, 1, 1)
    path, gained = judged(p, tokens, parents)
    assert path == [0, 2, 5]  # token 3 is impossible behind node 1; of the two behind node 2 the likelier one
    assert gained == [1, 1, 3]
    path, _ = judged(p, [0, 1, 3, 3, 3], parents)
    assert path == [0, 1]  # none goes on: the likelier first token


def test_a_place_that_is_not_reached_hides_none_behind_it():
    p = torch.full((5, 4), 0.25)
    p[0] = torch.tensor([0.96, 0.04, 0.0, 0.0])
    rule = Typical(epsilon=0.5, delta=1.0)
    # the first of the siblings is too unlikely, and what follows it is not judged; what follows the second is
    path, gained = judged(p, [1, 0, 2, 3], (-1, -1, 0, 1), rule=Typical(epsilon=0.2, delta=1.0))
    assert path == [0, 2, 4]
    assert gained[:2] == [0, 3]
    path, _ = judged(p, [1, 0, 2, 3], (-1, -1, 0, 1), rule=rule)
    assert path == [0, 2]


def test_no_draft_is_no_token_and_a_token_at_the_threshold_falls():
    p = torch.tensor([[0.4, 0.0, 0.0, 0.6], [0.25] * 4, [0.25] * 4])
    path, _ = judged(p, [0, -1], (-1, -1))  # -1 would be the last token of the vocabulary
    assert path == [0, 1]
    halves = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25] * 4])
    assert judged(halves, [0], rule=Typical(epsilon=0.5, delta=9.0))[0] == [0]
    assert judged(halves, [0], rule=Typical(epsilon=0.49, delta=9.0))[0] == [0, 1]


def test_greedy_answers_stay_what_they_are_and_sampled_ones_are_called_lossy():
    model = decoder()
    plain = generate(model, PROMPT, max_tokens=20)
    drafter = Guessing([plain.tokens], tree=True)
    answer = generate(model, PROMPT, max_tokens=20, drafter=drafter, acceptance=Typical(), policy=ALWAYS)
    assert answer.tokens == plain.tokens
    assert answer.lossless
    rows = generate_batch(
        model, [PROMPT] * 2, max_tokens=20, sampling=[Sampling(), WARM], acceptance=Typical(),
        drafter=Guessing([plain.tokens] * 2, tree=True), policy=ALWAYS,
    )  # fmt: skip
    assert rows[0].tokens == plain.tokens
    assert [row.lossless for row in rows] == [True, False]
    assert len(rows[1].tokens) == 20


def test_places_are_judged_by_the_requests_own_distribution():
    model, sampling = decoder(), Sampling(temperature=0.7, top_p=0.6, repetition_penalty=1.5, seed=1)
    answers, kept = [], []

    class Noted(Typical):
        def __call__(self, logits, draft, requests):
            accepted = super().__call__(logits, draft, requests)
            nodes = accepted.nodes[0]
            tokens = draft.tokens[0, nodes].tolist()
            behind = [tokens[:i] for i in range(len(tokens) + 1)]
            p = distributions([requests[0]] * len(behind), logits[0, [0, *(i + 1 for i in nodes)]], behind)
            least = [min(0.09, 0.3 * math.exp(-float(torch.special.entr(row).sum()))) for row in p]
            for row, token, bound in zip(p, accepted.tokens[0], least, strict=True):
                answers.append((float(row[token]), bound))
            kept.extend(answers[-len(p) :][:-1])
            return accepted

    plain = generate(model, PROMPT, max_tokens=40, sampling=sampling)
    options = {"acceptance": Noted(), "drafter": Guessing([plain.tokens], k=4), "policy": ALWAYS}
    generate(model, PROMPT, max_tokens=40, sampling=sampling, **options)
    assert len(answers) > 20
    assert all(p > 0 for p, _ in answers)
    assert all(p > least for p, least in kept)
    assert len(kept) > 3


def test_options():
    with pytest.raises(UsageError, match="epsilon in"):
        Typical(epsilon=0.0)
    for wrong in (-1.0, 0.0):
        with pytest.raises(UsageError, match="delta > 0"):
            Typical(delta=wrong)
    with pytest.raises(UsageError, match=r"got 1\.5 and"):
        Typical(epsilon=1.5)
    assert Typical(epsilon=1.0).epsilon == 1
