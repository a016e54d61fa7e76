"""From one card's timeline to many: what DDP and FSDP change, whether a plan fits, and the figures people quote.

DDP keeps everything on every card and adds the buckets in which gradients travel. FSDP (fully sharded, ZeRO-3) splits
weights, gradients and optimiser by the number of cards N and gathers one block at a time:

    peak = max over t of  (weights + gradients + optimiser)(t) / N + activations(t) + temporaries(t) + gathered

`gathered` is what a card holds whole (see `Gathered`): weights that stay whole through the step, two blocks' weights
(the current and the prefetched one) while blocks run, and in the backward pass gradients on their way into shards.
Under autocast the gathered weights are half precision already (FSDP's mixed-precision policy), so no casts of all
weights are kept, which DDP does. The batch is the one card's own: N cards train N times as many samples a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from volvelle.inspect.memory_ledger import CATEGORIES, Entry, Point, thinned
from volvelle.inspect.memory_options import Cards, Shard
from volvelle.inspect.memory_session import Trace
from volvelle.inspect.memory_step import TrainingStep, units_of

SPLIT = CATEGORIES[:3]
"""What FSDP splits: weights, gradients, optimiser."""


@dataclass(frozen=True)
class CardPlan:
    """One card of `cards` under `shard`: its peak in bytes, what of it is communication, and whether it fits.

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
    communication = _communication(step, cards, shard)
    peak = 0

    def points() -> Iterator[Point]:
        nonlocal peak
        for moment in card_moments(trace, step, cards, shard):
            peak = max(peak, math.ceil(moment.total))
            sizes = (*moment.sizes, moment.communication)
            yield Point(moment.position, moment.phase, tuple(map(round, sizes)))

    timeline = tuple(thinned(points(), trace.start, trace.stop))
    return CardPlan(cards, shard, peak, communication, timeline)


def card_moments(trace: Trace, step: TrainingStep, cards: Cards, shard: Shard) -> Iterator[Moment]:
    """The moments of a step on one of the cards."""
    n = cards.count if shard == "fsdp" else 1
    gathered = Gathered.of(step) if n > 1 else None
    buckets = _communication(step, cards, shard) if gathered is None else 0
    # Autocast's copies of weights are gathered instead of kept.
    amp = n > 1 and step.options.precision == "amp"
    blocks, entries = trace.ledger.blocks, trace.ledger.entries
    casts = {i for i, block in enumerate(blocks) if amp and block.is_cast_weight(blocks)}
    kept = dict.fromkeys(CATEGORIES, 0)  # bytes of casts by category
    waiting = 0

    def follow(entry: Entry) -> None:
        nonlocal waiting
        block = blocks[entry.block]
        if entry.block in casts:
            kept[block.category or "temporaries"] += entry.sign * block.size
        if entry.block in trace.root_gradients:
            waiting += entry.sign * block.size

    for entry in entries[: trace.start]:
        follow(entry)
    for index, phase, sums in trace.ledger.rows(trace.start, trace.stop):
        follow(entries[index])
        sizes = tuple(sums[name] - kept[name] for name in CATEGORIES)
        if gathered is None:
            yield Moment(index, phase, sizes, buckets)
        elif phase == "optimiser":  # it works on shards alone, and needs no block gathered
            yield Moment(index, phase, tuple(size / n for size in sizes), 0, constant=True)
        else:
            weights, gradients, optimiser, *rest = sizes
            split = weights / n, (gradients - waiting) / n + waiting, optimiser / n
            whole = gathered.forward(index in trace.in_blocks) if phase == "forward" else gathered.beside(waiting)
            yield Moment(index, phase, (*split, *rest), whole)


def _communication(step: TrainingStep, cards: Cards, shard: Shard) -> int:
    if cards.count == 1:
        return 0
    if shard == "fsdp":
        return Gathered.of(step).most
    # DDP: one bucket a group of parameters, together as large as the gradients.
    return sum(p.numel() * p.element_size() for p in step.trainable)


@dataclass(frozen=True)
class Gathered:
    """What a rank holds whole beside its shards, in bytes of weights and of gradients.

    As training shards: every block (`units_of`) is a unit, and all else is one more, the root, whose weights stay whole
    from the forward pass on, and whose gradients wait for the end of the backward pass to be reduced. Under autocast
    weights are gathered in half precision; gradients are reduced in their own.
    """

    root_weights: int
    root_gradients: int
    block_weights: int
    block_gradients: int

    @classmethod
    def of(cls, step: TrainingStep) -> Gathered:
        """Count them; of the blocks the largest matters."""
        amp = step.options.precision == "amp"
        units, root = units_of(step.model)

        def weights(unit: Sequence[Tensor]) -> int:
            return sum(p.numel() * (2 if amp else p.element_size()) for p in unit)

        def gradients(unit: Sequence[Tensor]) -> int:
            return sum(p.numel() * p.element_size() for p in unit if p.requires_grad)

        return cls(
            weights(root), gradients(root), max(map(weights, units), default=0), max(map(gradients, units), default=0)
        )

    def forward(self, in_blocks: bool) -> int:
        """Whole weights in the forward pass: those of a block are dropped behind it, and the loss needs none."""
        return self.root_weights + (2 * self.block_weights if in_blocks else 0)

    def beside(self, waiting: int) -> int:
        """Whole weights and buffers in the backward pass, when root gradients of `waiting` bytes are there."""
        if waiting and waiting == self.root_gradients:  # past the blocks: the last one's buffer, or the root's own
            return max(self.root_weights + self.block_gradients, self.root_gradients)
        return self.root_weights + 2 * self.block_weights + 2 * self.block_gradients  # one block is fetched ahead

    @property
    def most(self) -> int:
        """The most of it, with the root's gradients where they are all there."""
        return max(self.beside(0), self.root_gradients + self.beside(self.root_gradients))


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
