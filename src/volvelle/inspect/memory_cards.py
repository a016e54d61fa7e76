"""From one card's timeline to many: what DDP and FSDP change, whether a plan fits, and the figures people quote.

DDP keeps everything on every card and adds the buckets in which gradients travel. FSDP (fully sharded, ZeRO-3) splits
weights, gradients and optimiser by the number of cards N and gathers one block at a time:

    peak = max over t of  (weights + gradients + optimiser)(t) / N + activations(t) + temporaries(t) + whole(t)

`whole` is what a card does not share with others (see `Shards`): weights that stay whole through the step, two blocks'
weights (the current and the prefetched one) while blocks run, and in the backward pass gradients until they are shards.
Under autocast weights are gathered in fp32, and every rank keeps autocast's casts of all of them for the backward pass,
as training does here. The batch is the one card's own: N cards train N times as many samples a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from volvelle.inspect.memory_ledger import CATEGORIES, Point, thinned
from volvelle.inspect.memory_options import Cards, Shard
from volvelle.inspect.memory_session import Trace
from volvelle.inspect.memory_shards import Shards
from volvelle.inspect.memory_step import TrainingStep

SPLIT = CATEGORIES[:3]
"""What FSDP splits: weights, gradients, optimiser."""


@dataclass(frozen=True)
class CardPlan:
    """One card of `cards` under `shard`: its peak in bytes, the most of communication, and whether it fits.

    Of many cards there is a `timeline`, whose sizes are those of CATEGORIES and communication.
    """

    cards: Cards
    shard: Shard
    peak: int
    communication: int
    timeline: tuple[Point, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the peak is within the card's capacity."""
        return self.peak <= self.cards.capacity

    @property
    def verdict(self) -> str:
        """One sentence."""
        name = "" if self.cards.count == 1 else f", {self.shard} over {self.cards.count}"
        share = 100 * self.peak / self.cards.capacity
        need = f"{gigabytes(self.peak)} of {self.cards.gigabytes:g} GB on each card{name} ({share:.0f} %)"
        return f"fits: {need}" if self.fits else f"does not fit: {need}"


def gigabytes(number: float) -> str:
    """Bytes as decimal gigabytes or megabytes.

    >>> gigabytes(64.3e9), gigabytes(1.5e6)
    ('64.3 GB', '1.5 MB')
    """
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


class Moment(NamedTuple):
    """One moment on one card: its ledger position and phase, bytes in the order of CATEGORIES, and of communication.

    `constant` says that nothing of it grows with the batch.
    """

    position: int
    phase: str
    sizes: tuple[float, ...]
    communication: float
    constant: bool = False

    @property
    def total(self) -> float:
        """All bytes."""
        return sum(self.sizes) + self.communication

    @property
    def growing(self) -> float:
        """Bytes that grow with the batch."""
        return 0.0 if self.constant else sum(self.sizes[len(SPLIT) :])

    @property
    def fixed(self) -> float:
        """Bytes that persist or travel."""
        return self.total - self.growing


def card_plan(trace: Trace, step: TrainingStep, cards: Cards, shard: Shard) -> CardPlan:
    """What one card holds at its peak."""
    if cards.count == 1:
        return CardPlan(cards, shard, trace.peak, 0)
    peak = communication = 0

    def points() -> Iterator[Point]:
        nonlocal peak, communication
        for moment in card_moments(trace, step, cards, shard):
            peak = max(peak, math.ceil(moment.total))
            communication = max(communication, round(moment.communication))
            sizes = (*moment.sizes, moment.communication)
            yield Point(moment.position, moment.phase, tuple(map(round, sizes)))

    timeline = tuple(thinned(points(), trace.start, trace.stop))
    return CardPlan(cards, shard, peak, communication, timeline)


def card_moments(trace: Trace, step: TrainingStep, cards: Cards, shard: Shard) -> Iterator[Moment]:
    """The moments of a step on one of the cards."""
    if shard == "fsdp" and cards.count > 1:
        yield from _sharded(trace, step, cards.count)
        return
    # DDP: one bucket a group of parameters, together as large as the gradients.
    buckets = sum(p.numel() * p.element_size() for p in step.trainable) if cards.count > 1 else 0
    for index, phase, sums in trace.ledger.rows(trace.start, trace.stop):
        yield Moment(index, phase, tuple(sums[name] for name in CATEGORIES), buckets)


def _sharded(trace: Trace, step: TrainingStep, ranks: int) -> Iterator[Moment]:
    shards = Shards(trace, step, ranks)
    entries = trace.ledger.entries
    for entry in entries[: trace.start]:
        shards.follow(entry)
    passes, before = 0, ""
    for index, phase, sums in trace.ledger.rows(trace.start, trace.stop):
        shards.follow(entries[index])
        passes, before = passes + (phase == "forward" != before), phase
        if passes > 1 and phase != "optimiser":  # a further micro-batch: as the first, beside what `Shards` adds
            continue
        sizes = [sums[name] for name in CATEGORIES]
        if phase == "optimiser":  # it works on shards alone, and needs no block gathered
            yield Moment(index, phase, tuple(size / ranks for size in sizes), 0, constant=True)
        else:
            weights, gradients, optimiser, *rest = sizes
            split = weights / ranks, shards.gradients(gradients), optimiser / ranks
            yield Moment(index, phase, (*split, *rest), shards.communication(index, phase))


@dataclass(frozen=True)
class Formula:
    """A rule of thumb for full fine-tuning with Adam: bytes for each parameter, without activations."""

    name: str
    parts: str
    bytes_each: int


FORMULAS = (
    Formula("pure bf16", "bf16 weights 2 + gradients 2 + Adam 4", 8),
    Formula("fp32, or bf16 autocast", "fp32 weights 4 + gradients 4 + Adam 8", 16),
    Formula("bf16 with fp32 masters", "bf16 weights 2 + gradients 2, fp32 master 4 + gradients 4 + Adam 8", 20),
)


def quoted_figures(parameters: int, card: float = 80.0) -> str:
    """Explain how figures such as "7B needs 2 x 80 GB, 72B needs 20 x 80 GB" come about, as a table.

    The rules count weights, gradients and optimiser, no activations; the quotes round up to whole cards.

    >>> print(quoted_figures(7_721_324_544).splitlines()[-1])
    bf16 with fp32 masters   20 B x 7.72e9 =   154.4 GB -> 2 x 80 GB = 160 GB   (bf16 weights 2 + gradients 2, ...
    """
    lines = ["full fine-tuning with Adam, without activations:"]
    for formula in FORMULAS:
        total = formula.bytes_each * parameters / 1e9
        cards = math.ceil(total / card)
        lines.append(
            f"{formula.name:<24} {formula.bytes_each:>2} B x {parameters / 1e9:.2f}e9 = {total:>7.1f} GB "
            f"-> {cards} x {card:g} GB = {cards * card:g} GB   ({formula.parts})"
        )
    return "\n".join(lines)


INCLUDED = (
    "counted: weights, gradients and Adam's two moments, with fp32 masters where there are some, split over all "
    "cards (FSDP, ZeRO-3); under DDP every card holds all of it",
    "not counted: activations, temporaries, gathered blocks and communication buffers, fragmentation, the CUDA context",
)

QUOTE = (
    "Often quoted for full fine-tuning in mixed precision: 7B about 160 GB (2 x 80), 72B about 1600 GB (20 x 80). Both "
    "follow from 20 bytes a parameter: 7.72e9 x 20 = 154 GB, rounded up to 2 cards = 160 GB; 72.29e9 x 20 = 1446 GB, "
    "which is 19 cards, and with 8 GB a card left for what is not counted, 20 cards = 1600 GB. With 16 bytes a "
    "parameter they would be 124 GB (2 cards) and 1157 GB (15 cards)."
)
