"""A full fine-tune as LoRA: how much of a change of weights lies in its first singular parts."""

from __future__ import annotations

import copy
import itertools
import statistics
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from volvelle.adapt.extract import Extraction

CLAIM = Claim(
    title="Low-rank extraction of a full fine-tune",
    family="adapt",
    paper=Paper(
        "Hu et al.",
        2021,
        "LoRA: Low-Rank Adaptation of Large Language Models",
        "sections 4.1 and 7.2",
        "https://arxiv.org/abs/2106.09685",
    ),
    sentence="the updates to the weights also have a low intrinsic rank during adaptation",
    measured_by="SmolLM2-135M fully fine-tuned on table-to-text; the truncated SVD of every weight's difference "
    "(Eckart & Young 1936): energy kept, and the share of the fall of the held-out loss that each "
    "rank keeps",
    summary="Turns a full fine-tune into an adapter: small to store, and switched and mixed with others on "
    "one base model.",
    summary_zh="把一次完整微调转换成适配器：存储小，可在同一基础模型上与其他适配器切换和混用。",
    seconds={"quick": 60, "full": 600},
    parts=(),
    recipe="volvelle adapt extract smollm2 runs/adapt-smollm2-full-1",
)

RANKS = {"quick": (4, 32), "full": (4, 16, 64)}
ENERGY = 0.9


def measure(budget: Budget) -> Measurement:
    """A full fine-tune, cut to rank after rank."""
    from volvelle.adapt import extract_lora
    from volvelle.claims.adapt_runs import method_bench

    methods = {}
    from volvelle.errors import VolvelleError

    try:
        bench = method_bench(budget, methods)
    except VolvelleError as error:
        return Measurement(unmeasurable=f"SmolLM2 or the data cannot be had: {error}")
    tuned, base_loss = bench.trained("full"), bench.base_loss
    whole = base_loss - bench.loss(tuned)
    findings = [
        Finding("held-out loss a token before training", base_loss, "nats"),
        Finding("held-out loss of the full fine-tune", base_loss - whole, "nats"),
    ]
    model = copy.deepcopy(bench.model)
    found = extract_lora(model, tuned, energy=ENERGY)
    kept = []
    for rank in sorted(RANKS[budget], reverse=True):  # each cut is of the one before: singular parts come in order
        energy, share = _cut(found, rank), (base_loss - bench.loss(model)) / whole
        kept.append(energy)
        what = f"rank {rank}: fall of the loss over the full fine-tune's"
        findings += [
            Finding(f"rank {rank}: energy kept, median of {len(found.layers)} layers", 100 * energy, "%"),
            at_least(what, share, 0.9, "x") if rank == max(RANKS[budget]) else Finding(what, share, "x"),
        ]
    findings.append(at_least("least growth of the energy from rank to rank", _least_growth(kept[::-1]), 0.0))
    ranks = statistics.median(layer.rank / min(layer.shape) for layer in found.layers.values())
    what = f"rank that keeps {ENERGY:.0%} of the energy, of the full rank (median)"
    findings.append(at_most(what, ranks, 0.25, "x"))
    notes = [bench.note, "norms, which the adapter cannot hold, stay the base's", "Adam's steps of equal size fill the "
             "spectrum: low in rank is what changes the loss more than what changed"]  # fmt: skip
    return Measurement(findings, setting=bench.about, peers=bench.peers, notes=notes)


def _cut(found: Extraction, rank: int) -> float:
    """Leave the first singular parts of every layer; the median of the energy that they keep."""
    energies = []
    for path, layer in found.layers.items():
        a, b = (found.adapted.trainable[f"{path}.adapters.{found.adapted.name}.{name}"] for name in "ab")
        squares = a.detach().double().square().sum(1).square()  # A holds the roots of the singular values
        energies.append(
            float(squares[:rank].sum() / squares.sum()) * layer.energy if rank < layer.rank else layer.energy
        )
        b.data[:, rank:] = 0
    return statistics.median(energies)


def _least_growth(values: list[float]) -> float:
    return min(b - a for a, b in itertools.pairwise(values))
