"""N-gram drafts: what followed the last tokens is counted, in the text and in answers that were written before."""

from __future__ import annotations

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least

CLAIM = Claim(
    title="N-gram drafts from earlier answers",
    family="decode",
    paper=Paper(
        "He et al.",
        2024,
        "REST: Retrieval-Based Speculative Decoding",
        "abstract",
        "https://arxiv.org/abs/2311.08252",
    ),
    sentence="the process of text generation often includes certain common phases and patterns; drafts retrieved from "
    "existing text speed up code or text generation by 1.62x to 2.36x without additional training",
    measured_by="SmolLM2-135M, greedy, batch 1, data-to-text prompts, plain decoding and drafts turn about: what "
    "followed in prompt and answer alone, and in the model's own answers to other prompts too (the paper searches a "
    "text for the longest suffix; here grams of 1 to 4 tokens are counted and mixed); answers compared in fp32",
    summary="Counts what followed the last few tokens, in this text and in earlier answers, and drafts a tree of the "
    "likeliest continuations: no network, nothing to train.",
    summary_zh="统计最近几个词元之后曾出现过什么（本文与先前的回答），把最可能的后续组成草稿树：无需网络，无需训练。",
    seconds={"quick": 60, "full": 600},
    recipe="volvelle draft smollm2 data=prompts distill=true precision=bf16 kind=ngram",
)

SIZES: dict[Budget, dict[str, int]] = {
    "quick": {"answers": 48, "tokens": 32, "asked": 4, "rounds": 2},
    "full": {"answers": 960, "tokens": 64, "asked": 12, "rounds": 5},
}
PAPER = 1.62
"""The least speed-up that the paper found."""


def measure(budget: Budget) -> Measurement:
    """Let the model answer, count its answers, and decode other prompts with the counts and without."""
    import torch

    from volvelle.claims.decode_runs import compare, in_fp32, same_answers, smollm2
    from volvelle.claims.own_answers import answers, ask
    from volvelle.decode.drafters.ngram import NGram
    from volvelle.decode.policy import Adaptive
    from volvelle.errors import VolvelleError

    size = SIZES[budget]
    try:
        model = smollm2()
        prompts, asked = ask(model, size["answers"], size["asked"])
    except VolvelleError as error:
        return Measurement(unmeasurable=f"SmolLM2 or the data cannot be had: {error}")
    texts = [answer for _, answer in answers(model, prompts, size["tokens"])]
    findings = list[Finding]()
    differing = 0
    drafters = {"own text alone": NGram(), f"{len(texts)} earlier answers too": NGram(texts)}
    for who, drafter in drafters.items():
        found = compare(
            model, drafter, asked, policy=Adaptive(), max_tokens=size["tokens"], rounds=size["rounds"], eos_ids=None
        )
        differing += found.differing
        findings += [
            Finding(f"{who}: tokens gained by a step", found.per_step),
            Finding(f"{who}: draft tokens kept a step with a draft", found.kept_a_draft, "tokens"),
            at_least(f"{who}: speed-up", found.speed_up, PAPER if drafter.texts else 0.97, "x", spread=found.spread),
        ]
    exact = compare(in_fp32(model), NGram(texts), asked[:3], max_tokens=size["tokens"], rounds=1, eos_ids=None)
    findings += [
        Finding(f"{model.dtype} answers that differ from plain ones, of {2 * len(asked)}", differing),
        same_answers("n-grams", exact, "fp32"),
    ]
    setting = {**size, "model": "SmolLM2-135M-Instruct", "dtype": str(model.dtype), "n": NGram().n, "k": NGram().k,
               "threads": torch.get_num_threads(), "tokens counted": sum(map(len, texts))}  # fmt: skip
    notes = ["the paper counts for models of 7B and 13B, whose plain step costs more beside a draft"]
    return Measurement(findings, setting=setting, notes=notes)
