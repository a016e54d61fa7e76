"""Speculative decoding: a draft by part of the model itself (or a trained small one) against plain decoding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least

if TYPE_CHECKING:
    from volvelle.decode.contract import Drafter
    from volvelle.systems.language.decoder import Decoder

CLAIM = Claim(
    title="Speculative decoding with a draft model",
    family="decode",
    paper=Paper(
        "Leviathan et al.",
        2023,
        "Fast Inference from Transformers via Speculative Decoding",
        "abstract",
        "https://arxiv.org/abs/2211.17192",
    ),
    sentence="our method can accelerate existing off-the-shelf models without retraining or architecture changes; we "
    "demonstrate it on T5-XXL and show a 2X-3X acceleration, with identical outputs",
    measured_by="SmolLM2-135M, greedy, batch 1, plain decoding and drafts turn about; the draft is the model without "
    "some of its own layers, and a small one trained by `volvelle draft kind=small` where runs/ holds such a run; "
    "answers compared token by token in fp32; theorem 3.8 and the bound from the measured cost of a step",
    summary="A cheap model drafts a few tokens, the large one checks them in one step: the same answers in fewer steps "
    "of the large model.",
    summary_zh="廉价的草稿模型先写几个词元，大模型一步全部校验：答案不变，大模型所需步数更少。",
    seconds={"quick": 60, "full": 900},
    recipe='volvelle generate smollm2 "The three primary colours are" draft=skip:10 stats=true',
)

MODEL = "smollm2"
PROMPTS = {
    "explain": "Why is the sky blue? Explain it to a child.",
    "list": "List the months of the year with a typical weather for each.",
    "code": "Write a Python function that returns the largest of three numbers.",
    "story": "Write a short story about a lighthouse keeper who finds a map.",
    "letter": "Write a polite letter to a neighbour about a broken fence.",
}
SIZES = {"quick": (2, 40, 2, (10,), (3,)), "full": (5, 64, 5, (4, 10, 20), (1, 3, 5))}
"""Prompts, tokens an answer, rounds, layers left out, draft lengths."""


def measure(budget: Budget) -> Measurement:
    """Acceptance, cost and speed-up of each draft at fixed lengths, and of the best one as the policy uses it."""
    from volvelle.claims.decode_runs import Fixed, open_bench
    from volvelle.decode.policy import Adaptive
    from volvelle.errors import VolvelleError

    count, tokens, rounds, skips, ks = SIZES[budget]
    try:
        bench = open_bench(dict([*PROMPTS.items()][:count]), tokens, rounds)
    except VolvelleError as error:
        return Measurement(unmeasurable=f"SmolLM2 cannot be had: {error}")
    drafters, note = drafts_for(bench.model, skips, max(ks))
    findings = bench.curve_findings()
    first = best = next(iter(drafters))
    speed = 0.0
    for who, drafter in drafters.items():
        for k in ks:
            fixed = Fixed(k)
            found = bench.compare(drafter, fixed)
            findings += bench.judged(f"{who}, k = {k}" if len(ks) > 1 else who, found, fixed)
            if found.speed_up > speed:
                best, speed = who, found.speed_up
    adaptive = bench.compare(drafters[best], Adaptive())
    findings += [
        at_least("best draft at its best fixed length: speed-up", speed, 2.0, "x"),
        at_least(f"{best}, lengths chosen by the policy: speed-up", adaptive.speed_up, 0.97, "x",
                 spread=adaptive.spread),
        Finding(f"{bench.setting['dtype']} answers that differ from plain ones, of {count}", adaptive.differing),
        bench.identical(first, drafters[first], tokens, [*bench.prompts][:2]),
    ]  # fmt: skip
    notes = [
        note,
        "the paper's target is 40 to 1400 times its draft; of a model of 135M a cheap part says little of what it says",
    ]
    return Measurement(findings, setting=bench.setting | {"left out": list(skips), "k": list(ks)}, notes=notes)


def drafts_for(model: Decoder, skips: tuple[int, ...], k: int) -> tuple[dict[str, Drafter], str]:
    """What can draft for this model here, by name, and a note on where it comes from."""
    from volvelle.decode.drafters.early_exit import EarlyExit, without

    depth = model.config.depth
    found: dict[str, Drafter] = {f"without {n} of {depth} layers": EarlyExit(without(depth, n), k) for n in skips}
    run = small_run(Path("runs"))
    if run is None:
        return found, "runs/ holds no small draft model; `volvelle draft smollm2 data=… kind=small` trains one"
    from volvelle.decode.drafters.opening import open_drafter

    found[f"trained draft {run.name}"] = open_drafter(run, model, k=k)
    return found, f"the trained draft is {run}"


def small_run(root: Path) -> Path | None:
    """The newest finished run of `volvelle draft smollm2 kind=small` below `root`."""
    from volvelle.runs import RunFolder

    found = []
    for weights in root.glob("*/weights/config.json"):
        folder = weights.parents[1]
        manifest = RunFolder.open(folder).manifest
        if (manifest.get("kind"), manifest.get("base_model"), manifest.get("status")) == ("draft", MODEL, "finished"):
            found.append((weights.stat().st_mtime, folder))
    return max(found)[1] if found else None
