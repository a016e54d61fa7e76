"""Bottleneck adapters: small networks inside every block, near full fine-tuning."""

from __future__ import annotations

from volvelle.claims.claim import Budget, Claim, Measurement, Paper

CLAIM = Claim(
    title="Bottleneck adapters",
    family="adapt",
    paper=Paper(
        "Houlsby et al.",
        2019,
        "Parameter-Efficient Transfer Learning for NLP",
        "abstract, sections 2.1 and 3",
        "https://arxiv.org/abs/1902.00751",
    ),
    sentence="adapters attain near state-of-the-art performance: within 0.4 % of the performance of full fine-"
    "tuning, adding only 3.6 % parameters per task; near-identity initialisation leaves the network "
    "as it was when training starts",
    measured_by="SmolLM2-135M on table-to-text at equal steps, each method with the best of the same learning "
    "rates: fall of the held-out loss over that of full fine-tuning, the share trained, and the "
    "change of logits at step 0",
    summary="A narrow network behind each sublayer is trained and the model left alone: the first of the "
    "methods that share one frozen model among many tasks.",
    summary_zh="在每个子层后加一个窄网络来训练，模型本身不变：多任务共享同一冻结模型的最早方法。",
    seconds={"quick": 60, "full": 900},
    parts=("functional.bottleneck_adapter", "nn.BottleneckAdapter"),
    recipe="volvelle adapt smollm2 data=examples.jsonl method=adapter",
)

FORMS = {"quick": ("houlsby",), "full": ("houlsby", "pfeiffer", "parallel")}


def measure(budget: Budget) -> Measurement:
    """Quality and share of every form."""
    from volvelle.adapt.methods import Bottleneck
    from volvelle.claims.adapt_runs import against_full, begins_as_the_base, method_bench
    from volvelle.errors import VolvelleError

    methods = {form: Bottleneck(form=form) for form in FORMS[budget]}
    try:
        bench = method_bench(budget, methods)
    except VolvelleError as error:
        return Measurement(unmeasurable=f"SmolLM2 or the data cannot be had: {error}")
    findings = []
    for form in methods:
        found = against_full(bench, form, most=0.036, least=None if form == "parallel" else 0.95)
        known = {finding.what for finding in findings}
        findings += [finding for finding in found if finding.what not in known]
        findings.append(begins_as_the_base(bench, form))
    notes = [
        bench.note,
        "'within 0.4 %' is of GLUE's scores; here it is the fall of a generative loss",
        "the parallel form is a later paper's (He et al. 2021), and stands here for comparison",
    ]
    return Measurement(findings, setting=bench.about, peers=bench.peers, notes=notes)
