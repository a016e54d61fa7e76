"""Gapped texts: how much is masked, what stays, and how they stand beside the pairs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tests.data.test_pairs import EXAMPLES

from volvelle.data.denoising import SHARE, SPAN, denoised, infilled
from volvelle.data.pairs import pairs
from volvelle.data.text import Corpus
from volvelle.train.summarize import train_tokenizer

MASK = 4


def test_a_share_is_masked_and_the_rest_stays_in_order():
    draw, text = np.random.default_rng(0), list(range(10, 3010))
    gone = gaps = spans = 0
    for _ in range(40):
        found = infilled([0, *text, 2], MASK, draw)
        assert (found[0], found[-1]) == (0, 2)
        inner = found[1:-1]
        kept = [token for token in inner if token != MASK]
        assert kept == sorted(set(kept))
        assert all(one != MASK or other != MASK for one, other in itertools.pairwise(inner))
        gone, gaps = gone + len(text) - len(kept), gaps + inner.count(MASK)
        places = [9, *kept, 3010]
        spans += sum(b - a > 1 for a, b in itertools.pairwise(places))
    assert gone / (40 * len(text)) == pytest.approx(SHARE, abs=0.01)
    assert gone / gaps == pytest.approx(SPAN, rel=0.2)  # neighbouring gaps are one
    assert spans < gaps  # some masks stand for nothing


@pytest.mark.parametrize("text", [[], [2], [0, 2]])
def test_texts_without_an_inside_stay(text):
    assert infilled(text, MASK, np.random.default_rng(0)) == text


def test_gapped_texts_follow_the_pairs():
    corpus = Corpus("x", examples=EXAMPLES)
    tokenizer = train_tokenizer(corpus, 300)
    plain = pairs(start=2)
    before = plain.encode(corpus, tokenizer, context=64)
    noisy = denoised(plain, mask=MASK, copies=2.0, seed=7)
    found = noisy.encode(corpus, tokenizer, context=64)
    assert len(found) == 3 * len(before)
    for i in range(len(before)):
        assert all(torch.equal(a, b) for a, b in zip(found[i], before[i], strict=True))
    for i in range(len(before), len(found)):
        (ids, learn), (own, answer) = found[i], before[i % len(before)]
        assert torch.equal(ids[learn], own[~answer])
        assert set(ids[~learn].tolist()) <= {*own[~answer].tolist(), MASK}
        assert found.source(i) == before.source(i % len(before))
    again = noisy.encode(corpus, tokenizer, context=64)
    assert all(torch.equal(found[i][0], again[i][0]) for i in range(len(found)))
    other = denoised(plain, mask=MASK, copies=2.0, seed=8).encode(corpus, tokenizer, context=64)
    assert any(not torch.equal(found[i][0], other[i][0]) for i in range(len(before), len(found)))
    assert noisy.collate is plain.collate
