"""DoRA: the magnitude and the direction of each weight, trained apart."""

from __future__ import annotations

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_most

CLAIM = Claim(
    title="Weight-decomposed low-rank adaptation (DoRA)",
    family="adapt",
    paper=Paper(
        "Liu et al.",
        2024,
        "DoRA: Weight-Decomposed Low-Rank Adaptation",
        "abstract, sections 4 and 5",
        "https://arxiv.org/abs/2402.09353",
    ),
    sentence="DoRA consistently outperforms LoRA on fine-tuning, also at small ranks, without any additional "
    "inference overhead",
    measured_by="SmolLM2-135M on table-to-text at equal steps and ranks, each method with the best of the same "
    "learning rates: the held-out loss of DoRA over LoRA's; the modules of a merged model against the "
    "base's",
    summary="LoRA that also learns how large each output's weights are: a little better at the same rank, a "
    "little slower to train, and as free to run once merged.",
    summary_zh="LoRA 之外再学习每个输出权重的大小：同秩下略好，训练略慢，合并后推理同样没有开销。",
    seconds={"quick": 60, "full": 900},
    parts=("functional.dora_linear",),
    recipe="volvelle adapt smollm2 data=examples.jsonl method=dora",
)

RANKS = {"quick": (4,), "full": (2, 8)}


def measure(budget: Budget) -> Measurement:
    """DoRA over LoRA at equal ranks; a merged model."""
    from volvelle.adapt.methods import DoRA, LoRA
    from volvelle.claims.adapt_runs import begins_as_the_base, method_bench, no_latency

    ranks = RANKS[budget]
    methods = {f"lora {rank}": LoRA(rank=rank, alpha=2 * rank) for rank in ranks}
    methods |= {f"dora {rank}": DoRA(rank=rank, alpha=2 * rank) for rank in ranks}
    from volvelle.errors import VolvelleError

    try:
        bench = method_bench(budget, methods)
    except VolvelleError as error:
        return Measurement(unmeasurable=f"SmolLM2 or the data cannot be had: {error}")
    findings = []
    for rank in ranks:
        lora, dora = bench.result(f"lora {rank}"), bench.result(f"dora {rank}")
        findings += [
            Finding(f"rank {rank}: held-out loss of LoRA (rate {lora.rate:g})", lora.seen, "nats"),
            Finding(f"rank {rank}: held-out loss of DoRA (rate {dora.rate:g})", dora.seen, "nats"),
            at_most(f"rank {rank}: loss of DoRA over that of LoRA", dora.seen / lora.seen, 1.0, "x"),
        ]
    kind = f"dora {ranks[0]}"
    findings += [begins_as_the_base(bench, kind), *no_latency(bench, kind)]
    notes = [bench.note, "one seed; differences of a percent are within what seeds change"]
    return Measurement(findings, setting=bench.about, peers=bench.peers, notes=notes)
