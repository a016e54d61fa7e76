"""Prompt tuning: trained embeddings before the text, against words that people write there and full fine-tuning."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_most

if TYPE_CHECKING:
    from volvelle.claims.prompt_runs import PromptBench

CLAIM = Claim(
    title="Prompt tuning",
    family="adapt",
    paper=Paper(
        "Lester et al.",
        2021,
        "The Power of Scale for Parameter-Efficient Prompt Tuning",
        "abstract, sections 3.1 and 3.2",
        "https://arxiv.org/abs/2104.08691",
    ),
    sentence="soft prompts learned through backpropagation outperform GPT-3's few-shot learning by a large margin; as "
    "models exceed billions of parameters the method closes the gap to model tuning, and below that a gap is left",
    measured_by="SmolLM2-135M on table-to-text: held-out loss a token of a trained prompt, of the frozen model behind "
    "written instructions and behind examples (few-shot), and of full fine-tuning at equal steps; the share of "
    "numbers trained; prompts begun at words and at random, with two seeds; the gap on decoders of three sizes that "
    "are trained here (full)",
    summary="A few trained embeddings before the text: the smallest way to turn one frozen model to a task, some "
    "kilobytes each.",
    summary_zh="只在文本前训练少量嵌入向量：让同一个冻结模型适应各任务的最小方式，每个任务只占几 KB。",
    seconds={"quick": 60, "full": 900},
    recipe="volvelle adapt smollm2 data=examples.jsonl method=prompt",
)

LENGTH = 20
"""Embeddings of a prompt: the paper finds little beyond 20."""
RATES = {"prompt": (1e-2, 3e-2), "full": (3e-5, 1e-4)}
SHOTS = (1, 2, 4)
WIDTHS = (32, 64, 128)
"""Of the decoders that show the gap by size."""


def measure(budget: Budget) -> Measurement:
    """Losses of trained prompts, written ones and full fine-tuning; shares; where prompts begin."""
    from volvelle.claims.prefix import CODES
    from volvelle.claims.prompt_runs import prompt_bench
    from volvelle.errors import VolvelleError

    quick = budget == "quick"
    try:
        bench = prompt_bench(budget, LENGTH)
    except VolvelleError as error:
        return Measurement(unmeasurable=f"SmolLM2 or the data cannot be had: {error}")
    written = {code: bench.code_loss(code) for code in CODES}
    written |= {f"{n} examples": bench.code_loss(bench.shots(n)) for n in SHOTS}
    kind = min(written, key=lambda name: written[name])
    base = bench.base_loss
    rate, prompt = bench.best_rate("prompt", RATES["prompt"][: 1 if quick else None])
    full_rate, full = bench.best_rate("full", RATES["full"][: 1 if quick else None])
    findings = [
        at_most("numbers trained, of the model's", 100 * bench.share, 0.01, "%"),
        Finding("loss a token before any training", base, "nats"),
        Finding(f"best of {len(written)} written prompts ({kind}): loss a token", written[kind], "nats"),
        Finding(f"trained prompt (rate {rate:g}): loss a token", prompt, "nats"),
        Finding(f"full fine-tuning (rate {full_rate:g}): loss a token", full, "nats"),
        at_most("trained prompt over the best written one", prompt / written[kind], 1.0, "x"),
        at_most(
            "share of full fine-tuning's fall of the loss: at this size a gap is left",
            (base - prompt) / (base - full),
            1.0,
            "x",
        ),
    ]
    if not quick:
        findings += [*_beginnings(bench, rate, prompt), *_by_size()]
    setting = {k: v for k, v in bench.setting.items() if k not in ("prefix", "learning rates")}
    setting |= {"prompt": f"{LENGTH} embeddings", "examples": bench.n, "learning rates": RATES}
    notes = [
        "loss a token stands in for the paper's SuperGLUE, and SmolLM2 for T5; prompts bear the largest rates",
        bench.note,
    ]
    if not quick:
        notes.append(
            "the decoders of three sizes have a hundredth of the parameters of the paper's smallest model and less: "
            "their gaps are shown, and no bound is held against them"
        )
    return Measurement(findings, setting=setting, peers=bench.peers, notes=notes)


def _beginnings(bench: PromptBench, rate: float, prompt: float) -> list[Finding]:
    """Prompts begun at words of the vocabulary against prompts begun at random: section 3.2."""
    words = [prompt, bench.loss("prompt", rate, seed=1)]
    random = [bench.loss("random prompt", rate, seed=seed) for seed in (0, 1)]
    return [
        Finding("begun at words: loss a token", statistics.mean(words), "nats", spread=(min(words), max(words))),
        Finding("begun at random: loss a token", statistics.mean(random), "nats", spread=(min(random), max(random))),
        at_most("begun at words, over begun at random", statistics.mean(words) / statistics.mean(random), 1.0, "x"),
    ]


def _by_size() -> list[Finding]:
    """What share of full fine-tuning's gain a prompt has, on decoders of growing width."""
    from volvelle.claims.prompt_runs import gain_of_size

    found = {width: gain_of_size(width, LENGTH) for width in WIDTHS}
    shown = [
        Finding(f"decoder of width {width}: share of full fine-tuning's fall of the loss", gain, "x")
        for width, gain in found.items()
    ]
    return [*shown, Finding("the same, widest minus narrowest", found[max(found)] - found[min(found)], "x")]
