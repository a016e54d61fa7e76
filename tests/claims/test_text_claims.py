"""The claims on perplexity and BLEU hold, and would not if the metrics were wrong."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from volvelle.claims import bleu, perplexity
from volvelle.claims.perplexity import COUNTS, LETTERS, WORDS, circuit, words_of
from volvelle.train import evaluate, language


def broken(found):
    return [f.what for f in found.findings if f.held is False]


def test_perplexity_holds():
    found = perplexity.measure("quick")
    assert found.verdict == "held", broken(found)


def test_the_text_has_every_transition_as_often_as_told():
    text = circuit(3, seed=1)
    assert len(text) == 3 * sum(map(sum, COUNTS))
    seen = Counter(pairwise(text + text[0]))
    assert all(seen[a, b] == 3 * COUNTS[i][j] for i, a in enumerate(LETTERS) for j, b in enumerate(LETTERS))
    assert circuit(3, seed=2) != text


def test_every_text_is_read_in_words_in_one_way():
    numbers, covered = words_of("abaddbc", WORDS)
    assert [WORDS[n] for n in numbers] == ["ab", "ad", "db"]
    assert covered == 6  # c alone begins a word and ends none
    assert sum(4.0 ** -len(word) for word in WORDS) == 1  # as many words as a complete dictionary has


def test_a_mean_over_batches_instead_of_tokens_would_be_noticed(monkeypatch):
    right = language.completion_loss

    def wrong(model, batch):
        found = right(model, batch)
        return type(found)(found.value, weight=1.0)

    monkeypatch.setattr(language, "completion_loss", wrong)
    found = broken(perplexity.measure("quick"))
    assert "the source as the model: loss less the source's entropy, nats a letter" in found
    assert "one model, three tokenizers: relative spread of its bits a byte" in found


def test_bleu_holds():
    found = bleu.measure("quick")
    assert found.verdict == "held", broken(found)


def test_the_formula_by_hand():
    """The paper's example of clipping, and precisions of 5/6, 3/5, 2/4 and 1/3 without a penalty."""
    assert bleu.by_loops(
        ["the the the the the the the"], [["the cat is on the mat", "there is a cat on the mat"]], 1
    ) == (pytest.approx(100 * 2 / 7))
    found = bleu.by_loops(["a b c d x e"], [["a b c d e f"]])
    assert found == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert bleu.by_loops(["x y"], [["a b"]]) == 0


@pytest.mark.parametrize("kind", ["no penalty", "mean of sentences", "rounded"])
def test_another_bleu_would_be_noticed(kind, monkeypatch):
    right = evaluate.bleu

    def wrong(outputs, references):
        if kind == "mean of sentences":
            each = [right([o], [r]) for o, r in zip(outputs, references, strict=True)]
            return sum(each) / len(each)
        if kind == "rounded":
            return float(round(right(outputs, references)))
        longer = [
            f"{o} {o}" if len(o.split()) < len(r[0].split()) else o for o, r in zip(outputs, references, strict=True)
        ]
        return right(longer, references)

    monkeypatch.setattr(evaluate, "bleu", wrong)
    assert broken(bleu.measure("quick"))
