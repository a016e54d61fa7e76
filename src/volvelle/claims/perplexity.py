"""Perplexity: what a perfect model gets on a source of known entropy, and what another tokenizer makes of it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

CLAIM = Claim(
    title="Perplexity, and bits a byte",
    family="metrics",
    paper=Paper(
        "Gao et al.",
        2020,
        "The Pile: An 800GB Dataset of Diverse Text for Language Modeling",
        "section 3.1; the entropy of a Markov source: Shannon 1948, section 7",
        "https://arxiv.org/abs/2101.00027",
    ),
    sentence="Bits per byte is preferred over bits per character or perplexity when using Pile as a metric due to its "
    "invariance to different tokenization schemes",
    measured_by="texts that hold every transition of a Markov source exactly as often as its probability says, "
    "measured as `volvelle eval` measures held-out text: the source itself as the model against its entropy, worse "
    "models against the entropy plus their divergence; the same source and text in letters, in pairs and in words of "
    "a dictionary: perplexity and bits a byte of each",
    summary="Perplexity counts the choices a model leaves at each token, so it says nothing without its tokenizer; "
    "bits a byte can be compared.",
    summary_zh="困惑度是模型在每个词元上平均剩下的选择数，只有分词相同时才可比较；换成每字节比特数便与分词无关。",
    seconds={"quick": 30, "full": 120},
    recipe="volvelle eval RUN data=PATH",
)

LETTERS = "abcd"
COUNTS = ((30, 4, 1, 5), (2, 10, 7, 1), (1, 5, 20, 4), (7, 1, 2, 10))
"""How often a letter (row) is followed by another; rows and columns have equal sums, so the source is stationary."""
WORDS = ("aa", "ab", "ac", "ad", "b", "cc", "ca", "cb", "cd", "da", "db", "dc", "dd")
"""A dictionary in which every text can be read in exactly one way: no word begins another, and none is missing."""


def measure(budget: Budget) -> Measurement:
    """One text of 1,100 letters (full: five of 110,000)."""
    import torch

    times, seeds = (10, 1) if budget == "quick" else (1000, 5)
    rate, errors, divergence, found = entropy(), [], [], list[dict[str, tuple[float, float]]]()
    for seed in range(seeds):
        text = circuit(times, seed)
        cyclic = text + text[0]
        errors.append(abs(loss(letter_model(source()), text[:1], cyclic[1:]) - rate))
        divergence += _worse(cyclic, rate, seed)
        found.append(tokenized(text))
    findings = [
        at_most("the source as the model: loss less the source's entropy, nats a letter", max(errors), 1e-9),
        Finding("perplexity of the source", math.exp(rate)),
        at_most(
            "worse models: loss less (entropy + divergence), largest of all",
            max(abs(a - b) for a, b in divergence),
            1e-9,
        ),
        at_least("least excess of a worse model over the entropy, nats", min(a for a, _ in divergence), 0.0),
        *_compared(found),
    ]
    setting = {"source": [list(row) for row in COUNTS], "letters": len(text), "texts": seeds, "dtype": "fp64"}
    notes = [
        "bits a byte = loss a token x tokens / bytes / ln 2; `volvelle eval` prints loss and perplexity of tokens",
        "a real tokenizer can write a text in several ways, a loss takes one: its bits a byte are an upper bound",
    ]
    peers = {"entropy rate": "-Σ π_i P_ij log P_ij", "torch": torch.__version__}
    return Measurement(findings, peers=peers, setting=setting, notes=notes)


def source() -> list[list[float]]:
    """P_ij, the probability that letter j follows letter i."""
    return [[count / sum(row) for count in row] for row in COUNTS]


def shares() -> list[float]:
    """π_i, how often letter i occurs."""
    total = sum(map(sum, COUNTS))
    return [sum(row) / total for row in COUNTS]


def entropy() -> float:
    """-Σ π_i P_ij log P_ij, nats a letter."""
    return -sum(pi * p * math.log(p) for pi, row in zip(shares(), source(), strict=True) for p in row)


def circuit(times: int, seed: int) -> str:
    """A text that, read as a ring, has every transition i -> j exactly `times` x COUNTS[i][j] times, in a drawn order.

    A walk over all edges of a graph whose nodes have as many edges in as out (Euler 1741, by Hierholzer's rule).
    """
    draw, left = random.Random(seed), []
    for row in COUNTS:
        ways = [j for j, count in enumerate(row) for _ in range(count * times)]
        draw.shuffle(ways)
        left.append(ways)
    walk, stack = list[int](), [0]
    while stack:
        if left[stack[-1]]:
            stack.append(left[stack[-1]].pop())
        else:
            walk.append(stack.pop())
    return "".join(LETTERS[i] for i in reversed(walk[1:]))


def words_of(text: str, words: Sequence[str]) -> tuple[list[int], int]:
    """The text in words of a dictionary as their numbers, and the letters that they cover."""
    numbers, found, start = {word: i for i, word in enumerate(words)}, list[int](), 0
    longest = max(map(len, words))
    while start < len(text):
        length = next((n for n in range(1, longest + 1) if text[start : start + n] in numbers), None)
        if length is None or start + length > len(text):
            break
        found.append(numbers[text[start : start + length]])
        start += length
    return found, start


def word_model(words: Sequence[str], letters: Sequence[Sequence[float]]) -> Any:
    """The same source, a word at a time: P(word | last letter) is the product over its letters."""
    rows = []
    for last in range(len(LETTERS)):
        row = []
        for word in words:
            p, at = 1.0, last
            for letter in word:
                p, at = p * letters[at][LETTERS.index(letter)], LETTERS.index(letter)
            row.append(p)
        rows.append(row)
    return letter_model(rows, [LETTERS.index(word[-1]) for word in words])


def letter_model(rows: Sequence[Sequence[float]], last: Sequence[int] = (0, 1, 2, 3)) -> Any:
    """A language model as the losses of this library take it, whose next token depends on the last letter alone.

    rows[i] are the probabilities of all tokens after letter i; `last` is the last letter of each token. Token number
    len(last) + i begins a text as letter i would.
    """
    import torch
    from torch import nn

    class Model(nn.Module):
        plain_head = True
        letter: Tensor

        def __init__(self):
            super().__init__()
            table = torch.tensor(rows, dtype=torch.float64).log().T
            # Tokens that begin a text are never predicted: nothing is lost on a probability of 0.
            never = table.new_full((len(LETTERS), table.shape[1]), -1e9)
            self.table = nn.Parameter(torch.cat((table, never)))
            self.register_buffer("letter", torch.tensor([*last, *range(len(LETTERS))]))

        @property
        def output_weight(self) -> Tensor:
            return self.table

        def hidden(self, ids: Tensor, *, positions: Any = None, mask: Any = None) -> Tensor:
            return torch.nn.functional.one_hot(self.letter[ids], len(LETTERS)).double()

        def logits(self, hidden: Tensor) -> Tensor:
            return hidden @ self.table.T

    return Model()


def loss(model: Any, first: str, rest: str, words: Sequence[str] = tuple(LETTERS)) -> float:
    """Nats a token of `rest` after the letter `first`, by the function that measures held-out text everywhere here."""
    import torch

    from volvelle.data.loader import Loader
    from volvelle.data.packing import Windows, collate_windows
    from volvelle.train.language import held_out_loss

    tokens, _ = words_of(rest, words)
    begin = len(words) + LETTERS.index(first)
    windows = Windows(torch.tensor([begin, *tokens], dtype=torch.int32), 100)
    return held_out_loss(model, Loader(windows, 4, seed=0, collate=collate_windows, shuffle=False))["loss"]


def _worse(cyclic: str, rate: float, seed: int) -> list[tuple[float, float]]:
    """Of models that are not the source: the measured excess over the entropy, and Σ π_i P_ij log(P_ij / Q_ij)."""
    draw = random.Random(seed)
    noisy = [[p * math.exp(draw.gauss(0, 0.5)) for p in row] for row in source()]
    models = {
        "single letters": [shares() for _ in LETTERS],
        "equal chances": [[1 / len(LETTERS)] * len(LETTERS) for _ in LETTERS],
        "distorted": [[p / sum(row) for p in row] for row in noisy],
    }
    found = []
    for rows in models.values():
        told = sum(
            pi * p * math.log(p / q)
            for pi, ps, qs in zip(shares(), source(), rows, strict=True)
            for p, q in zip(ps, qs, strict=True)
        )
        found.append((loss(letter_model(rows), cyclic[0], cyclic[1:]) - rate, told))
    return found


def tokenized(text: str) -> dict[str, tuple[float, float]]:
    """Perplexity and bits a byte of the source as the model, in letters, pairs and words; and of single letters."""
    pairs = tuple(a + b for a in LETTERS for b in LETTERS)
    # As much of the text as ends with a pair and with a word.
    whole = next(n for n in range(len(text), 2, -1) if n % 2 and words_of(text[1:n], WORDS)[1] == n - 1)
    first, rest, found = text[0], text[1:whole], {}
    for name, words in (("letters", tuple(LETTERS)), ("pairs", pairs), ("words", WORDS)):
        found[name] = _read(word_model(words, source()), first, rest, words)
    found["single letters"] = _read(letter_model([shares() for _ in LETTERS]), first, rest, tuple(LETTERS))
    return found


def _read(model: Any, first: str, rest: str, words: Sequence[str]) -> tuple[float, float]:
    tokens, covered = words_of(rest, words)
    nats = loss(model, first, rest, words)
    return math.exp(nats), nats * len(tokens) / covered / math.log(2)


def _compared(found: list[dict[str, tuple[float, float]]]) -> list[Finding]:
    """One model, three tokenizers."""
    names = ("letters", "pairs", "words")
    bits = [max(one[n][1] for n in names) / min(one[n][1] for n in names) - 1 for one in found]
    square = [abs(one["pairs"][0] / one["letters"][0] ** 2 - 1) for one in found]
    apart = [max(one[n][0] for n in names) / min(one[n][0] for n in names) for one in found]
    return [
        at_most("one model, three tokenizers: relative spread of its bits a byte", max(bits), 1e-9),
        at_least("the same of its perplexity, greatest over least", min(apart), 2.0, "x"),
        at_most("perplexity in pairs over its square in letters, less 1", max(square), 1e-9),
        at_least(
            "perplexity of the perfect model in pairs over that of a model without memory in letters",
            min(one["pairs"][0] / one["single letters"][0] for one in found), 1.0, "x",
        ),
        at_most(
            "bits a byte of the same two, which are in the right order",
            max(one["pairs"][1] / one["single letters"][1] for one in found), 1.0, "x",
        ),
        *(Finding(f"perplexity in {name}", found[0][name][0]) for name in names),
        Finding("bits a byte, in each of them", found[0]["letters"][1]),
    ]  # fmt: skip
