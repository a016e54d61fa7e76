"""Data parallelism: many ranks with averaged gradients against one process with all of their samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most
from volvelle.claims.rank_runs import decoder, flat, relative, samples

if TYPE_CHECKING:
    import numpy as np

CLAIM = Claim(
    title="Data-parallel training by averaging gradients",
    family="train",
    paper=Paper(
        "Li et al.",
        2020,
        "PyTorch Distributed: Experiences on Accelerating Data Parallel Training",
        "sections 2.2 and 3.1",
        "https://doi.org/10.14778/3415478.3415530",
    ),
    sentence="replicas that begin alike and average their gradients in every backward pass stay alike, and train as "
    "one process would with the samples of all",
    measured_by="a small decoder on samples of unequal length, processes over gloo on loopback: the gradients at the "
    "same weights and the losses of a whole run against one process with the same global batch, the replicas' bits, "
    "and the bytes that the own ring sends a step against 2 (p - 1) V",
    summary="Trains one model on many processors: each takes a share of every batch, and all take the same step.",
    summary_zh="多个处理器共同训练一个模型：各自处理每个批次的一部分，平均梯度后走同一步。",
    seconds={"quick": 60, "full": 600},
    recipe="volvelle train language data=book.txt ranks=2",
)

BATCH, SAMPLES = 3, 47
HOOKS = {
    "torch.distributed": {},
    "own ring": {"all_reduce": "ring"},
    "own ring, bf16": {"all_reduce": "ring", "compress": True},
}
CURVES = ("torch.distributed", "own ring", "sharded weights (FSDP2)")


class Seen(NamedTuple):
    """What one process saw: gradients (steps, parameters) and losses (steps,), bytes it sent, its final weights."""

    gradients: np.ndarray
    losses: list[float]
    sent: int
    weights: np.ndarray


@dataclass(frozen=True)
class Setting:
    """One run: optimiser steps, micro-batches a step and process, and whether the weights move."""

    steps: int
    accumulate: int
    moves: bool
    weighted: bool = True
    shard: str = "ddp"


def measure(budget: Budget) -> Measurement:
    """Compare on 2 ranks (full: also 3 and 4, more steps, and sharded weights)."""
    from volvelle.train.launch import hush

    hush()
    import torch

    from volvelle.inspect.collectives_ranks import on_ranks

    worlds, steps, curve = ((2,), 6, 15) if budget == "quick" else ((2, 3, 4), 30, 100)
    findings: list[Finding] = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for p in worlds:
            jobs = [(Setting(steps, 2, moves=False), options) for options in HOOKS.values()]
            jobs += [(Setting(curve, 2, moves=True), options) for options in list(HOOKS.values())[:2]]
            jobs += [(Setting(curve, 2, moves=True, shard="fsdp"), {})] * (budget == "full")
            found = list(zip(*on_ranks(p, replica, (jobs,)), strict=True))
            still = alone(Setting(steps, 2 * p, moves=False))
            for name, seen in zip(HOOKS, found, strict=False):
                findings += _gradients(p, name, seen, still)
            findings.append(_unweighted(p, steps, still))
            moving = alone(Setting(curve, 2 * p, moves=True))
            for name, seen in zip(CURVES, found[len(HOOKS) :], strict=False):
                findings += _curves(p, name, seen, moving)
    finally:
        torch.set_num_threads(before)
    setting = {
        "dtype": "fp32",
        "model": "decoder, 2 blocks of width 32",
        "parameters": len(still.weights),
        "samples": f"{SAMPLES} of 4 to 40 tokens",
        "batches": f"two micro-batches of {BATCH} a step and rank; the last of an epoch has {SAMPLES % BATCH}",
        "ranks": list(worlds),
        "steps": {"gradients": steps, "losses": curve},
    }
    notes = (
        "Not bit-equal to one process: a sum over ranks is rounded in another order than a sum over micro-batches.",
        "Averaging the ranks' mean losses, without counting tokens, is another objective; its gradient is shown.",
    )
    return Measurement(findings, peers={"one process (torch)": torch.__version__}, setting=setting, notes=notes)


def _gradients(p: int, name: str, found: Sequence[Seen], one: Seen) -> list[Finding]:
    """Error and bytes of one way to average."""
    import numpy as np

    error = max(relative(mine, whole) for mine, whole in zip(found[0].gradients, one.gradients, strict=True))
    what = f"{p} ranks, {name}: largest relative error of a step's gradient"
    compressed = name.endswith("bf16")
    # bf16 has 8 significant bits: each of the p summands and p - 1 sums is off by at most 2^-9 of itself.
    findings = [at_most(what, error, 2**-9 * (2 * p - 1) if compressed else 1e-6)]
    differing = sum(not np.array_equal(seen.gradients, found[0].gradients) for seen in found)
    findings.append(at_most(f"{p} ranks, {name}: ranks whose gradients have other bits", differing, 0))
    if name != "torch.distributed":
        size = len(one.weights) * (2 if compressed else 4)
        a_step, rest = divmod(sum(seen.sent for seen in found), len(one.losses))
        findings.append(Finding(f"{p} ranks, {name}: bytes sent a step by all", a_step, "bytes"))
        beside = abs(a_step - 2 * (p - 1) * size) + rest
        findings.append(at_most(f"{p} ranks, {name}: bytes beside 2 (p - 1) V", beside, 0, "bytes"))
    return findings


def _unweighted(p: int, steps: int, one: Seen) -> Finding:
    naive = alone(Setting(steps, p, moves=False, weighted=False))
    error = max(relative(mine, whole) for mine, whole in zip(naive.gradients, one.gradients, strict=True))
    return at_least(f"{p} ranks, means averaged without weights: largest relative error", error, 1e-3)


def _curves(p: int, name: str, found: Sequence[Seen], one: Seen) -> list[Finding]:
    """How far the losses of a run come apart, and whether the replicas do."""
    import numpy as np

    apart = max(abs(a - b) / b for a, b in zip(found[0].losses, one.losses, strict=True))
    differing = sum(not np.array_equal(seen.weights, found[0].weights) for seen in found)
    return [
        at_most(f"{p} ranks, {name}: losses of {len(one.losses)} steps, largest relative difference", apart, 1e-4),
        at_most(f"{p} ranks, {name}: ranks whose final weights have other bits", differing, 0),
        Finding(
            f"{p} ranks, {name}: loss, first and last step", f"{found[0].losses[0]:.3f}, {found[0].losses[-1]:.3f}"
        ),
    ]


def alone(setting: Setting) -> Seen:
    """One process; `accumulate` is the number of micro-batches of all ranks together."""
    from volvelle.train.ranks import Ranks

    return _train(Ranks(), setting)


def replica(rank: int, jobs: Sequence[tuple[Setting, dict[str, Any]]]) -> list[Seen]:
    """The same on one of several ranks, one run after another."""
    from volvelle.train.launch import group
    from volvelle.train.options import FitOptions

    return [_train(group(FitOptions(shard=s.shard, **options)), s) for s, options in jobs]  # type: ignore[arg-type]


def _train(ranks: Any, setting: Setting) -> Seen:
    import numpy as np
    import torch

    from volvelle.data.loader import Loader
    from volvelle.data.tokens import collate
    from volvelle.train.language import LanguageObjective
    from volvelle.train.loop import fit
    from volvelle.train.observer import Quiet
    from volvelle.train.options import FitOptions
    from volvelle.train.phase import Loss, Phase

    class Watched(LanguageObjective):
        """Keeps every step's gradient and loss."""

        gradients: list[np.ndarray]

        def phases(self, steps: int) -> list[Phase]:
            (phase,) = super().phases(steps)
            self.gradients = []

            def make(parameters: Any) -> torch.optim.Optimizer:
                rate = 3e-3 if setting.moves else 0.0
                optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0)
                if not setting.moves:
                    optimizer.register_step_pre_hook(
                        lambda *_: self.gradients.append(flat(p.grad for p in parameters.values()))
                    )
                return optimizer

            return [Phase(phase.name, phase.parameters, phase.loss, make)]

        def loss(self, batch: Any) -> Loss:
            found = super().loss(batch)
            return found if setting.weighted else Loss(found.value)

    class Losses(Quiet):
        """Keeps every step's loss."""

        seen: tuple[float, ...] = ()

        def progress(self, progress: Any) -> None:
            self.seen = (*self.seen, progress.metrics["loss"])

    model, losses = decoder(32, 2, 96), Losses()
    chosen = FitOptions(steps=setting.steps, batch=BATCH, accumulate=setting.accumulate)
    objective = Watched(model, chosen)
    loader = Loader(samples(SAMPLES), BATCH, seed=0, collate=collate)
    fit(objective, loader, options=chosen, observer=losses, ranks=ranks)
    kept = np.stack(objective.gradients) if objective.gradients else np.empty(0)
    hook = getattr(ranks, "hook", None)
    return Seen(kept, list(losses.seen), hook.traffic.sent if hook else 0, flat(model.parameters()))
