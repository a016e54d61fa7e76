"""ROUGE against the package rouge-score, against itself computed another way, and by its bounds."""

from __future__ import annotations

import random

import pytest

from volvelle.parts.metrics.rouge import rouge_l, rouge_n, words

TEXTS = [
    "",
    "the",
    "Return the sum of all numbers.",
    "Return the number of sums; return the sum!",
    "the the the the",
    "x_1 = f(x_2), don't re-read",
    "naïve café 北京 42",
    "a b c d e f g h",
    "h g f e d c b a",
    "a x b y c z d",
]


def some_texts(seed, count=40):
    draw = random.Random(seed)
    return [" ".join(draw.choices("abcde", k=draw.randrange(12))) for _ in range(count)]


def slow_common(a, b):
    """The longest common subsequence by its definition."""
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return slow_common(a[:-1], b[:-1]) + 1
    return max(slow_common(a[:-1], b), slow_common(a, b[:-1]))


@pytest.mark.peer
def test_scores_equal_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rouge3", "rougeL"])
    texts = TEXTS + some_texts(1)
    for candidate in texts:
        for reference in texts[:: 1 if candidate in TEXTS else 7]:
            theirs = scorer.score(reference, candidate)
            ours = {f"rouge{n}": rouge_n(candidate, reference, n) for n in (1, 2, 3)}
            ours["rougeL"] = rouge_l(candidate, reference)
            for name, score in ours.items():
                assert score == pytest.approx(tuple(theirs[name])), (name, candidate, reference)


def test_rouge_l_is_the_longest_common_subsequence():
    for one, other in zip(some_texts(2), some_texts(3), strict=True):
        a, b = words(one)[:8], words(other)[:8]
        common = slow_common(a, b)
        found = rouge_l(" ".join(a), " ".join(b))
        assert found.precision == common / max(1, len(a))
        assert found.recall == common / max(1, len(b))


def test_bounds_and_exchange():
    for one, other in zip(some_texts(4), some_texts(5), strict=True):
        for score in (rouge_l, lambda a, b: rouge_n(a, b, 1), lambda a, b: rouge_n(a, b, 2)):
            found, swapped = score(one, other), score(other, one)
            assert (found.precision, found.recall) == (swapped.recall, swapped.precision)
            assert min(found.precision, found.recall) - 1e-12 <= found.f <= max(found.precision, found.recall) + 1e-12
        assert rouge_n(one, other, 2).f <= 1
        assert rouge_n(one, other).recall >= rouge_l(one, other).recall, "order can only take away"
    assert rouge_l("a b c", "a b c").f == rouge_n("a b c", "a b c", 2).f == 1


def test_a_repeated_word_counts_as_often_as_both_have_it():
    assert rouge_n("the the the the", "the cat and the dog").precision == 0.5


def test_n_below_one_is_refused():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        rouge_n("a", "a", 0)
