"""Know a training step's memory before running it: `plan_memory`.

The step runs under fake tensors: shapes and lifetimes are real, nothing is allocated. The plan promises the peak of
tensor allocations; a process's resident set is larger, by the interpreter, libraries and the allocator's slack.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from volvelle.errors import VolvelleError
from volvelle.inspect.memory_advice import Alternative, alternatives
from volvelle.inspect.memory_cards import CardPlan, card_moments, card_plan
from volvelle.inspect.memory_inputs import Inputs
from volvelle.inspect.memory_ledger import CATEGORIES, Ledger, Point, thinned
from volvelle.inspect.memory_options import Cards, Shard, StepOptions
from volvelle.inspect.memory_session import Session, StepSession, Trace
from volvelle.inspect.memory_step import Loss, model_loss
from volvelle.inspect.memory_values import LARGEST


@dataclass(frozen=True)
class Holding:
    """Alike blocks that live at the peak: how many, what they are, and their bytes together."""

    category: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    op: str
    module: str
    size: int


@dataclass
class MemoryPlan:
    """The memory of one training step. Sizes are bytes.

    `composition` splits `peak` by category; `phase`, `op` and `module` say where it is reached. `branches` lists what
    was assumed where the model asks about its tensors. `card` is set when cards were given, `largest_batch` when it was
    searched for; `more_may_fit` says that the search ended before a card was full. `print(plan)` shows the table,
    `plan.svg()` draws the timeline.
    """

    label: str
    batch: int
    peak: int
    composition: dict[str, int]
    phase: str
    op: str
    module: str
    device: str = "cpu"
    threads: int = 1
    parameters: int = 0
    trainable: int = 0
    timeline: list[Point] = field(default_factory=list)
    holdings: list[Holding] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    card: CardPlan | None = None
    largest_batch: int | None = None
    more_may_fit: bool = False
    cheaper: list[Alternative] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        from volvelle.inspect.memory_report import text

        return text(self)

    def svg(self) -> str:
        """The timeline as a self-contained SVG."""
        from volvelle.inspect.memory_drawing import timeline_svg

        return timeline_svg(self)


def plan_memory(
    build: Callable[[], nn.Module],
    batch: Any,
    *,
    size: int | None = None,
    loss: Loss = model_loss,
    gpus: str | Cards | None = None,
    shard: Shard = "ddp",
    search: bool = False,
    advise: bool = False,
    threads: int | None = None,
    eager: bool = True,
    **options: Any,
) -> MemoryPlan:
    """Predict the peak of tensor allocations in a training step of any module, without allocating it.

    `build()` makes the module (it runs under fake tensors, so its size does not matter). `batch` is an example whose
    first dimension is the batch, or a function `size -> inputs`; `size` overrides the example's. `loss(model, inputs)`
    defaults to the model's own. `options` are the fields of `StepOptions`: method ("full", "lora", "adapter",
    "prefix", a method of volvelle.adapt, or a function), precision, checkpointing, optimizer, device.

    `gpus` ("2x80") plans a CUDA step and adds a verdict under `shard`, with `search` also the largest batch a card
    holds. `advise` plans cheaper alternatives, until one fits. `threads` is the number of CPU threads whose buffers
    count (default: torch's). `eager=False` lets code that asks for fake tensors take its tracing branch. The step
    planned is a second one: the optimiser's state exists.

    Raises VolvelleError when the step needs values that a plan does not have, with the line that asked.

    >>> def step_loss(model, x):
    ...     return model(x).square().mean()
    >>> import torch
    >>> plan = plan_memory(lambda: nn.Linear(1000, 1000, bias=False), torch.zeros(8, 1000), loss=step_loss)
    >>> plan.composition["weights"], plan.composition["optimiser"]
    (4000000, 8000004)
    """
    began = time.perf_counter()
    cards = Cards.parse(gpus) if isinstance(gpus, str) else gpus
    if search and cards is None:
        raise VolvelleError("plan_memory: search=True needs gpus", tip='for example gpus="1x80"')
    chosen: dict[str, Any] = {"device": "cuda" if cards is not None else "cpu", **options}
    step_options = StepOptions(**chosen)
    inputs = Inputs(batch, size)
    settings: dict[str, Any] = {"loss": loss, "threads": threads, "eager": eager}
    with StepSession(build, inputs, step_options, **settings) as session:
        trace = session.trace(inputs.size)
        plan = describe(session, trace, label=step_options.label, batch=inputs.size)
        plan.device = step_options.device
        plan.parameters = sum(p.numel() for p in session.step.model.parameters())
        plan.trainable = sum(p.numel() for p in session.step.trainable)
        if cards is not None:
            plan.card = card_plan(trace, session.step, cards, shard)
            if search:
                plan.largest_batch, plan.more_may_fit = _largest(session, inputs, trace, plan.card)
    if advise:

        def replan(changed: StepOptions, changed_shard: Shard) -> tuple[int, CardPlan | None]:
            with StepSession(build, inputs, changed, **settings) as other:
                peak = other.trace(inputs.size)
                card = None if cards is None else card_plan(peak, other.step, cards, changed_shard)
                return (peak.peak if card is None else card.peak), card

        first = (plan.peak if plan.card is None else plan.card.peak), plan.card
        plan.cheaper = alternatives(step_options, first, shard, plan.parameters, replan)
    plan.seconds = time.perf_counter() - began
    return plan


def plan_program(setup: Callable[[Session], Callable[[], Any]], *, threads: int | None = None) -> MemoryPlan:
    """Plan any program, such as a step with several players and optimisers.

    `setup(session)` builds everything under fake tensors and returns the function to trace; it is called twice and
    the second call is reported. Inside, `session.adopt(modules and optimisers)` sorts their tensors into categories and
    `session.tracker.during(phase)` names phases.
    """
    began = time.perf_counter()
    with Session(threads=threads) as session:
        run = setup(session)
        with session.eager():
            run()
            start = session.position
            run()
        trace = session.trace_since(start)
        plan = describe(session, trace, label="program", batch=0)
    plan.seconds = time.perf_counter() - began
    return plan


def describe(session: Session, trace: Trace, *, label: str, batch: int) -> MemoryPlan:
    """Turn a trace into a plan."""
    entry = trace.ledger.entries[trace.at]
    block = trace.ledger.blocks[entry.block]
    return MemoryPlan(
        label=label,
        batch=batch,
        peak=trace.peak,
        composition=trace.composition,
        phase=entry.phase,
        op=_short(entry.op),
        module=block.module,
        threads=session.threads,
        timeline=timeline(trace),
        holdings=holdings(trace.ledger, trace.at),
        branches=[str(assumption) for assumption in session.assumptions],
    )


def timeline(trace: Trace) -> list[Point]:
    """The trace, thinned out."""
    rows = trace.ledger.rows(trace.start, trace.stop)
    moments = (Point(index, phase, tuple(sums[name] for name in CATEGORIES)) for index, phase, sums in rows)
    return list(thinned(moments, trace.start, trace.stop))


def holdings(ledger: Ledger, at: int, count: int = 12) -> list[Holding]:
    """The largest groups of like blocks at entry `at`: same category, shape, type, operation and kind of module."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index in ledger.live(at):
        block = ledger.blocks[index]
        module = re.sub(r"\.\d+(?=\.|$)", ".*", block.module)
        key = (block.category, block.shape, block.dtype, _short(block.op), module)
        groups.setdefault(key, []).append(block.size)
    rows = [
        Holding(category, len(sizes), shape, dtype, op, module, sum(sizes))
        for (category, shape, dtype, op, module), sizes in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.size)[:count]


def _largest(session: StepSession, inputs: Inputs, trace: Trace, first: CardPlan) -> tuple[int, bool]:
    """The largest batch whose peak fits; 0 when not even one sample fits.

    Newton's method from below: what is not fixed at each moment of the newest trace that fits is taken to grow with the
    batch, where a part of it is constant, so the batch that then fills the card fits too. Every answer is traced, and
    so is the batch after the last. The search ends, with True beside the batch, where a batch has more elements than
    the plan can follow the values of.
    """
    cards, most = first.cards, max(1, LARGEST // inputs.elements)
    low, high = 0, most + 1
    batch, tried = inputs.size, first
    while True:
        if tried.fits:
            low = batch
            moments = card_moments(trace, session.step, cards, first.shard)
            guess = int(batch * min((cards.capacity - m.fixed) / m.growing for m in moments if m.growing > 0))
        else:
            high, guess = batch, (low + batch) // 2
        if high - low == 1:
            return low, low == most
        batch = min(max(guess, low + 1), high - 1)
        trace = session.trace(batch)
        tried = card_plan(trace, session.step, cards, first.shard)


def _short(op: str) -> str:
    """The name of an operation without namespace and overload: aten::mm.out -> mm."""
    return op.partition("::")[2].partition(".")[0] or op
