"""A memory plan as text: what the peak is made of, where it is reached, what was assumed, whether it fits."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from volvelle.inspect.memory_cards import gigabytes

if TYPE_CHECKING:
    from volvelle.inspect.memory_plan import Holding, MemoryPlan

_BAR = 24


def text(plan: MemoryPlan) -> str:
    """The whole report."""
    lines = [*_head(plan), "", *_table(plan), "", *_largest(plan.holdings)]
    if plan.branches:
        lines += ["", "branches assumed where the model asks about its tensors:"]
        lines += [f"  {branch}" for branch in plan.branches]
    if plan.card is not None:
        lines += ["", plan.card.verdict]
        if plan.card.communication:
            what = "gradient buckets" if plan.card.shard == "ddp" else "gathered blocks"
            lines.append(f"  {what} take up to {gigabytes(plan.card.communication)} of it")
    if plan.largest_batch is not None:
        lines.append(_batch(plan))
    if plan.cheaper:
        lines += ["", "cheaper, each on top of the one before:" if len(plan.cheaper) > 1 else "cheaper:"]
        lines += [f"  {alternative}" for alternative in plan.cheaper]
    return "\n".join(lines)


def record(plan: MemoryPlan) -> dict[str, Any]:
    """The plan as plain data for programs: sizes in bytes."""
    card = plan.card
    return {
        "label": plan.label,
        "batch": plan.batch,
        "device": plan.device,
        "parameters": plan.parameters,
        "trained": plan.trainable,
        "peak": plan.peak,
        "composition": dict(plan.composition),
        "at": {"phase": plan.phase, "op": plan.op, "module": plan.module},
        "largest": [dataclasses.asdict(row) for row in plan.holdings],
        "branches": list(plan.branches),
        "cards": None
        if card is None
        else {
            "count": card.cards.count,
            "capacity": card.cards.capacity,
            "shard": card.shard,
            "peak": card.peak,
            "communication": card.communication,
            "fits": card.fits,
            "verdict": card.verdict,
        },
        "largest_batch": plan.largest_batch,
        "more_may_fit": plan.more_may_fit,
        "cheaper": [dataclasses.asdict(row) | {"says": str(row)} for row in plan.cheaper],
        "seconds": plan.seconds,
    }


def _head(plan: MemoryPlan) -> list[str]:
    where = f"{plan.op} in {plan.phase}" + (f", {plan.module}" if plan.module else "")
    sharded = plan.card is not None and plan.card.cards.count > 1 and plan.card.shard == "fsdp"
    before = " before sharding" if sharded else ""
    lines = [f"peak{before} {gigabytes(plan.peak)} of tensors ({plan.peak:,} bytes) at {where}"]
    if plan.parameters:
        share = f"{plan.trainable / 1e9:.3g}e9 trained" if plan.trainable >= 1e9 else f"{plan.trainable:,} trained"
        lines.append(f"{plan.label}; batch {plan.batch}; {plan.parameters:,} parameters, {share}; {_device(plan)}")
    lines.append("a process's resident set is larger: interpreter, libraries, allocator slack")
    return lines


def _device(plan: MemoryPlan) -> str:
    return plan.device if plan.device == "cuda" else f"{plan.device}, {plan.threads} threads"


def _table(plan: MemoryPlan) -> list[str]:
    lines = []
    for category, size in plan.composition.items():
        share = size / max(1, plan.peak)
        bar = "█" * round(share * _BAR)
        lines.append(f"  {category:<12} {gigabytes(size):>10}  {100 * share:5.1f} %  {bar}")
    lines.append(f"  {'together':<12} {gigabytes(plan.peak):>10}")
    return lines


def _largest(holdings: list[Holding]) -> list[str]:
    lines = ["largest at the peak:"]
    for row in holdings[:8]:
        shape = f"{row.count} x {row.dtype}{list(row.shape)}" if row.dtype else f"{row.count} x workspace"
        origin = row.module or row.op
        lines.append(f"  {gigabytes(row.size):>10}  {row.category:<12} {shape}  {origin}")
    return lines


def _batch(plan: MemoryPlan) -> str:
    if plan.largest_batch == 0:
        return "largest batch that fits: none, not even one sample"
    return f"largest batch that fits: {'at least ' * plan.more_may_fit}{plan.largest_batch} a card"
