"""ROUGE: how much of a reference summary a candidate holds, by words in a row (N) or in order (L).

Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries". Words are runs of the letters a to z and digits,
in lower case and without stemming, as in the package rouge-score (`use_stemmer=False`): text in other alphabets has
no words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from volvelle.export import export

_WORD = re.compile(r"[a-z0-9]+")


class Rouge(NamedTuple):
    """The shares, 0 to 1, of the candidate and of the reference that they have in common, and their harmonic mean."""

    precision: float
    recall: float
    f: float


def words(text: str) -> list[str]:
    """The words that ROUGE compares.

    >>> words("Don't re-read x_1.")
    ['don', 't', 're', 'read', 'x', '1']
    """
    return _WORD.findall(text.lower())


@export("functional.rouge_n")
def rouge_n(candidate: str, reference: str, n: int = 1) -> Rouge:
    """Return ROUGE-N: n-grams that candidate and reference share, each as often as it occurs in both.

    recall = Σ min(count in candidate, count in reference) / Σ count in reference, precision alike over the candidate,
    f = 2 precision recall / (precision + recall); 0 where there is nothing to share. Raises ValueError for n < 1.
    Lin 2004, section 2.

    >>> rouge_n("the cat sat", "the cat was here")
    Rouge(precision=0.6666666666666666, recall=0.5, f=0.5714285714285715)
    """
    if n < 1:
        raise ValueError(f"rouge_n: n must be at least 1, got {n}")
    ours, theirs = _ngrams(words(candidate), n), _ngrams(words(reference), n)
    return _score((ours & theirs).total(), ours.total(), theirs.total())


@export("functional.rouge_l")
def rouge_l(candidate: str, reference: str) -> Rouge:
    """Return ROUGE-L: the longest sequence of words that both hold in this order, with gaps.

    recall = LCS / words of the reference, precision = LCS / words of the candidate, f their harmonic mean (β = 1).
    Lin 2004, section 3.1.

    >>> rouge_l("police killed the gunman", "the gunman police killed")
    Rouge(precision=0.5, recall=0.5, f=0.5)
    """
    ours, theirs = words(candidate), words(reference)
    return _score(_longest_common(ours, theirs), len(ours), len(theirs))


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)  # row[j]: the longest of what is read of a, and of b up to j
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def _score(common: int, ours: int, theirs: int) -> Rouge:
    precision, recall = common / max(ours, 1), common / max(theirs, 1)
    return Rouge(precision, recall, 2 * precision * recall / (precision + recall) if common else 0.0)
