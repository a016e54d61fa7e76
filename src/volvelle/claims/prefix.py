"""Prefix tuning: a thousandth of the parameters, against full fine-tuning with few examples and on unseen topics.

A control code is a fixed text before every prompt that tells a model what to do (CTRL, Keskar et al. 2019). A prefix
begins here as the keys and values of such a text, so that what training adds to the best code can be told.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_most

if TYPE_CHECKING:
    from volvelle.claims.prefix_runs import Bench

CLAIM = Claim(
    title="Prefix tuning",
    family="adapt",
    paper=Paper(
        "Li & Liang",
        2021,
        "Prefix-Tuning: Optimizing Continuous Prompts for Generation",
        "abstract, sections 6.3, 6.4, 7.2 and 7.4",
        "https://arxiv.org/abs/2101.00190",
    ),
    sentence="by learning only 0.1 % of the parameters, prefix-tuning obtains comparable performance in the full data "
    "setting, outperforms fine-tuning in low-data settings, and extrapolates better to examples with topics unseen "
    "during training",
    measured_by="SmolLM2-135M on table-to-text at equal steps, each method with the best of the same learning rates: "
    "held-out loss a token of a prefix, full fine-tuning, a prompt (embeddings only) and fixed codes, for n examples",
    summary="A few trained keys and values before the text turn one frozen model to any task: kilobytes a task, and "
    "one model in memory for all of them.",
    summary_zh="在文本前放少量可训练的键和值，冻结的模型即可适应任意任务：每个任务只需几百 KB，内存中只有一个模型。",
    seconds={"quick": 60, "full": 900},
    parts=("functional.prefix_states", "nn.PrefixStates"),
    recipe="volvelle adapt smollm2 data=examples.jsonl method=prefix",
)

CODES = (
    "Write one sentence that says all of the following data:",
    "Table to text:",
    "Describe these facts in fluent English.",
)
"""Instructions that a user might put before every prompt."""


def measure(budget: Budget) -> Measurement:
    """Losses of prefix, full fine-tuning, prompt and codes, with few examples and on unseen topics."""
    from volvelle.claims.prefix_runs import open_bench
    from volvelle.errors import VolvelleError

    try:
        bench = open_bench(budget)
    except VolvelleError as error:
        return Measurement(unmeasurable=f"SmolLM2 or the data cannot be had: {error}")
    findings = [at_most("numbers stored of a prefix, of all parameters", 100 * bench.stored_share, 0.1, "%")]
    codes = {code: bench.code_loss(code) for code in CODES}
    best = min(codes, key=lambda code: codes[code])
    few, many = min(bench.counts), max(bench.counts)
    lengths = {}
    for n in bench.counts:
        lengths[n] = _against_full(bench, n, findings)
    findings += [
        Finding("loss a token before any training, best of three codes", codes[best], "nats"),
        at_most(f"a prefix from {few} examples, over the best code", lengths[few] / codes[best], 1.0, "x"),
    ]
    if budget == "full":
        findings += _other_ways(bench, few, best)
    setting = bench.setting | {"codes": list(CODES), "examples": list(bench.counts), "most": many}
    notes = [
        "loss a token stands in for the paper's BLEU: generation for every cell would not fit the budget",
        "'comparable in the full data setting' is measured by benchmarks/comparison.py; here the most examples are "
        f"{many}, at equal steps for all methods",
        bench.note,
    ]
    return Measurement(findings, setting=setting, peers=bench.peers, notes=notes)


def _against_full(bench: Bench, n: int, findings: list[Finding]) -> float:
    """Prefix and full fine-tuning on n examples; the prefix's loss on seen topics."""
    prefix, full = bench.best("prefix", n), bench.best("full", n)
    ratio = prefix.seen / full.seen
    findings += [
        Finding(f"n = {n}: loss a token of a prefix (rate {prefix.rate:g})", prefix.seen, "nats"),
        Finding(f"n = {n}: loss a token of full fine-tuning (rate {full.rate:g})", full.seen, "nats"),
    ]
    what = f"n = {n}: loss of a prefix over that of full fine-tuning"
    low = n <= 200
    findings.append(at_most(what, ratio, 1.0, "x") if low else Finding(what, ratio, "x"))
    if n == max(bench.counts):
        findings.append(at_most(f"n = {n}: the same on unseen topics", prefix.unseen / full.unseen, 1.0, "x"))
    return prefix.seen


def _other_ways(bench: Bench, n: int, code: str) -> list[Finding]:
    """Where a prefix begins, and embeddings alone: sections 7.2 and 7.4."""
    prefix = bench.best("prefix", n).seen
    random = statistics.mean(bench.best(kind, n).seen for kind in ("random prefix",))
    return [
        at_most(f"n = {n}: begun at words, over begun at random", prefix / random, 1.0, "x"),
        at_most(f"n = {n}: begun at the code, over begun at random", bench.best(code, n).seen / random, 1.0, "x"),
        at_most(f"n = {n}: a prefix, over a prompt (embeddings only)", prefix / bench.best("prompt", n).seen, 1.0, "x"),
    ]
