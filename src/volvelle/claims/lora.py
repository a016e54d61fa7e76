"""LoRA: near full fine-tuning with less than a hundredth of its parameters, and no added latency."""

from __future__ import annotations

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least

CLAIM = Claim(
    title="Low-rank adaptation (LoRA)",
    family="adapt",
    paper=Paper(
        "Hu et al.",
        2021,
        "LoRA: Low-Rank Adaptation of Large Language Models",
        "abstract, sections 4.1 and 5",
        "https://arxiv.org/abs/2106.09685",
    ),
    sentence="LoRA performs on-par or better than fine-tuning in model quality despite having fewer trainable "
    "parameters, a higher training throughput, and, unlike adapters, no additional inference latency; "
    "it reduces the memory that training takes by 3 times",
    measured_by="SmolLM2-135M on table-to-text at equal steps, each method with the best of the same learning "
    "rates: fall of the held-out loss over that of full fine-tuning, with rank 4 on all linear layers; the modules of "
    "a merged model against the base's; bytes held",
    summary="Two thin matrices beside each large one are trained, and folded into it afterwards: a fine-tune "
    "of a few megabytes that costs nothing to run.",
    summary_zh="在每个大矩阵旁训练两个细长矩阵，之后并入原矩阵：微调只需几 MB，推理没有额外开销。",
    seconds={"quick": 60, "full": 900},
    parts=("functional.lora_linear", "nn.LoRALinear"),
    recipe="volvelle adapt smollm2 data=examples.jsonl method=lora",
)

STATE = 3.0
"""Least factor by which gradients and optimiser state, with the weights, shrink."""
QUERIES = "the same of rank 8 on queries and values alone, {:.2f} % trained"
"""The paper's own choice of layers, which reaches less in as few steps."""


def measure(budget: Budget) -> Measurement:
    """Quality, share, merged model, and bytes that a training holds."""
    from volvelle.adapt.methods import LoRA
    from volvelle.claims.adapt_runs import against_full, begins_as_the_base, method_bench, no_latency
    from volvelle.errors import VolvelleError

    methods = {"lora": LoRA(rank=4, alpha=16, targets="all-linear"), "queries": LoRA(rank=8, alpha=16)}
    try:
        bench = method_bench(budget, methods)
    except VolvelleError as error:
        return Measurement(unmeasurable=f"SmolLM2 or the data cannot be had: {error}")
    findings = [
        *against_full(bench, "lora", most=0.01, least=0.95),
        begins_as_the_base(bench, "lora"),
        *no_latency(bench, "lora"),
    ]
    if budget == "full":
        findings.append(Finding(QUERIES.format(100 * bench.share("queries")), bench.gain("queries"), "x"))
    total = sum(p.numel() for p in bench.model.parameters())
    trained = bench.share("lora") * total
    # fp32: weights, and for what is trained a gradient and Adam's two moments.
    ratio = 16 * total / (4 * (total + trained) + 12 * trained)
    findings.append(at_least("bytes of weights, gradients and Adam: full over lora", ratio, STATE, "x"))
    notes = [
        bench.note,
        "the paper's 10,000 times fewer parameters are GPT-3's; the share falls with the model's width",
    ]
    return Measurement(findings, setting=bench.about, peers=bench.peers, notes=notes)
