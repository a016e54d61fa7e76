"""BLEU: the paper's formula by loops, its brevity penalty, and how far equal outputs come apart under its options."""

from __future__ import annotations

import itertools
import math
import random
import re
import statistics
from collections import Counter
from collections.abc import Sequence

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

CLAIM = Claim(
    title="BLEU, and what its options change",
    family="metrics",
    paper=Paper(
        "Post",
        2018,
        "A Call for Clarity in Reporting BLEU Scores",
        "abstract; the formula: Papineni et al. 2002, sections 2.1 to 2.3",
        "https://aclanthology.org/W18-6319",
    ),
    sentence="BLEU is in fact a parameterized metric whose values can vary wildly with changes to these parameters … "
    "I quantify this variation, finding differences as high as 1.8 between commonly used configurations",
    measured_by="sentences of Python's language reference, with words left out, exchanged and replaced as outputs: the "
    "score of `volvelle eval` (sacrebleu's) against the paper's formula by loops over n-grams, with one and with "
    "several references; whole prefixes against exp(1 - r / c); the same outputs under other tokenizers, case, "
    "smoothing and averages; outputs that get worse step by step",
    summary="Counts the word sequences that an output shares with references; comparable only with all options named.",
    summary_zh="统计译文与参考译文共有的词序列；只有注明分词、大小写与平滑等全部选项，分数才可比较。",
    seconds={"quick": 30, "full": 120},
    recipe="volvelle eval RUN data=PATH",
)

SAME = 1e-5
"""The scores are rounded to six digits."""
APART = 1.8
"""Points between common configurations, after Post 2018."""


def measure(budget: Budget) -> Measurement:
    """60 sentences (full: 1500)."""
    import sacrebleu

    lines = sentences(60 if budget == "quick" else 1500)
    rows = 4 if budget == "quick" else 20
    findings = [*_formula(lines, rows), *_brevity(lines), *_options(lines), *_worse(lines)]
    setting = {"sentences": len(lines), "words": sum(len(line.split()) for line in lines), "orders": 4}
    notes = [
        "whether BLEU agrees with people cannot be measured here: only that it falls as outputs are spoilt further",
        "`none` leaves the tokens to the user, as papers do that give no tokenizer: here to nobody",
        "`volvelle eval` uses sacrebleu's defaults: 13a, case as it is, smoothing exp, one score for all outputs",
    ]
    peers = {"loops": "Papineni et al. 2002", "sacrebleu": sacrebleu.__version__}
    return Measurement(findings, peers=peers, setting=setting, notes=notes)


def sentences(count: int) -> list[str]:
    """Sentences of 8 to 40 words from the language reference that every Python carries."""
    from pydoc_data.topics import topics

    text = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics)))
    found = [one for one in re.split(r"(?<=[a-z)]\.) (?=[A-Z])", text) if 8 <= len(one.split()) <= 40]
    return found[:: max(1, len(found) // count)][:count]


def spoilt(line: str, much: float, seed: object, words: Sequence[str]) -> str:
    """The line with about `much` of its words left out, exchanged with the next one, or replaced."""
    draw, found = random.Random(f"{seed}/{line}"), list[str]()
    for word in line.split():
        chance = draw.random() / much if much else 1.0
        if chance < 0.3:
            continue
        found.append(draw.choice(words) if chance < 0.6 else word)
        if 0.6 <= chance < 1.0 and len(found) > 1:
            found[-1], found[-2] = found[-2], found[-1]
    return " ".join(found) or line.split()[0]


def plain(line: str) -> str:
    """Words alone in lower case: what every tokenizer reads alike."""
    return " ".join(re.findall(r"[a-z]+", line.lower())) or "nothing"


def by_loops(outputs: Sequence[str], references: Sequence[Sequence[str]], orders: int = 4) -> float:
    """BLEU of Papineni et al. 2002: exp(min(0, 1 - r / c)) (Π p_n)^(1 / 4) x 100, words apart by spaces.

    p_n are clipped counts over all outputs, r the lengths of the references nearest to each output's (of two the
    shorter). A p_n of 0 counts as half, a quarter, … of one match, which is sacrebleu's smoothing.
    """
    hits, totals, c, r = [0] * orders, [0] * orders, 0, 0
    for output, rights in zip(outputs, references, strict=True):
        words, others = output.split(), [right.split() for right in rights]
        c += len(words)
        r += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        for n in range(orders):
            grams = Counter(_grams(words, n + 1))
            most = Counter[tuple[str, ...]]()
            for other in others:
                most |= Counter(_grams(other, n + 1))
            hits[n] += sum((grams & most).values())
            totals[n] += sum(grams.values())
    if not hits[0]:
        return 0.0
    logs, missing = 0.0, 0
    for hit, total in zip(hits, totals, strict=True):
        if not total:
            return 0.0
        missing += not hit
        logs += math.log(hit / total if hit else 0.5**missing / total) / orders
    return 100 * math.exp(min(0.0, 1 - r / c) + logs)


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _formula(lines: Sequence[str], rows: int) -> list[Finding]:
    """Random corpora, the papers' example of clipping, and one output alone."""
    from volvelle.train.evaluate import bleu

    texts, worst, draw = [plain(line) for line in lines], 0.0, random.Random(0)
    words = " ".join(texts).split()
    for row in range(rows):
        chosen = draw.sample(texts, min(len(texts), 40))
        outputs = [spoilt(line, draw.uniform(0.1, 0.8), row, words) for line in chosen]
        references = [
            [line, *(spoilt(line, 0.3, (row, k), words) for k in range(draw.randint(0, 3)))] for line in chosen
        ]
        worst = max(worst, abs(bleu(outputs, references) - by_loops(outputs, references)))
    pairs = [([spoilt(line, 0.5, "alone", words)], [[line]]) for line in texts[:50]]
    alone = max(abs(bleu(*pair) - by_loops(*pair)) for pair in pairs)
    the = ["the the the the the the the"]
    rights = [["the cat is on the mat", "there is a cat on the mat"]]
    return [
        at_most("corpora with one to four references: largest difference from the formula, points", worst, SAME),
        at_most("single outputs, some of whose precisions are 0: the same", alone, SAME),
        at_most("the paper's seven times 'the': the same", abs(bleu(the, rights) - by_loops(the, rights)), SAME),
    ]


def _brevity(lines: Sequence[str]) -> list[Finding]:
    """Prefixes have precisions of 1 everywhere: what is left is the penalty. Twice the text has no penalty."""
    from volvelle.train.evaluate import bleu

    texts = [plain(line).split() for line in lines]
    worst, shown = 0.0, []
    for share in (0.5, 0.7, 0.9):
        outputs = [words[: max(4, round(len(words) * share))] for words in texts]
        r, c = sum(map(len, texts)), sum(map(len, outputs))
        found = bleu([" ".join(one) for one in outputs], [[" ".join(one)] for one in texts])
        worst = max(worst, abs(found - 100 * math.exp(1 - r / c)))
        shown.append(f"{found:.1f}")
    twice = bleu([" ".join(one + one) for one in texts], [[" ".join(one)] for one in texts])
    return [
        at_most("prefixes of the references: BLEU less 100 exp(1 - r / c)", worst, SAME),
        Finding("BLEU of prefixes of 50, 70 and 90 % of the words", ", ".join(shown)),
        at_most("every output written twice: BLEU, whose precisions are half at most", twice, 50.0),
    ]


def _options(lines: Sequence[str]) -> list[Finding]:
    """The same outputs and references under configurations in use."""
    from sacrebleu.metrics.bleu import BLEU

    from volvelle.train.evaluate import bleu

    words = " ".join(lines).split()
    outputs = [spoilt(line, 0.4, "options", words) for line in lines]
    score = lambda **options: BLEU(**options).corpus_score(outputs, [lines]).score  # type: ignore[arg-type] # noqa: E731
    found = {
        f"{tokens}, {'lower case' if lower else 'case as it is'}": score(tokenize=tokens, lowercase=lower)
        for tokens, lower in itertools.product(("13a", "intl", "none"), (False, True))
    }
    single = [
        BLEU(effective_order=True).sentence_score(o, [line]).score for o, line in zip(outputs, lines, strict=True)
    ]
    few = {how: statistics.mean(_alone(o, line, how) for o, line in zip(outputs[:300], lines, strict=False))
           for how in ("exp", "floor", "add-k", "none")}  # fmt: skip
    own = abs(bleu(outputs, [[line] for line in lines]) - found["13a, case as it is"])
    return [
        at_most("the score of `volvelle eval` less sacrebleu's default", own, SAME),
        at_least(
            "six common configurations: greatest score less least",
            _range(found, ""),
            APART,
            "points",
        ),
        Finding("the same without those that leave words as the text has them", _range(found, "13a", "intl"), "points"),
        *(Finding(name, value) for name, value in found.items()),
        Finding("characters in place of words", score(tokenize="char")),
        Finding("mean of the outputs' own scores, in place of one for all", statistics.mean(single)),
        *(Finding(f"the same with smoothing {how}", value) for how, value in few.items()),
    ]


def _range(found: dict[str, float], *tokenizers: str) -> float:
    values = [value for name, value in found.items() if name.startswith(tokenizers)]
    return max(values) - min(values)


def _alone(output: str, line: str, how: str) -> float:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(smooth_method=how).corpus_score([output], [[line]]).score


def _worse(lines: Sequence[str]) -> list[Finding]:
    """Outputs spoilt further, by three draws: the score must fall at every step."""
    from volvelle.train.evaluate import bleu

    words, steps, rises, curves = " ".join(lines).split(), (0.0, 0.1, 0.2, 0.4, 0.6, 0.8), 0, []
    for seed in range(3):
        scores = [
            bleu([spoilt(line, much, seed, words) for line in lines], [[line] for line in lines]) for much in steps
        ]
        rises += sum(later >= earlier for earlier, later in itertools.pairwise(scores))
        curves.append(scores)
    shown = ", ".join(f"{statistics.mean(values):.1f}" for values in zip(*curves, strict=True))
    return [
        at_most(f"steps of {3 * (len(steps) - 1)} towards worse outputs at which BLEU does not fall", rises, 0),
        at_most("outputs that are the references: BLEU less 100", abs(curves[0][0] - 100), SAME),
        Finding(f"BLEU with {', '.join(f'{100 * much:.0f}' for much in steps)} % of the words spoilt", shown),
    ]
