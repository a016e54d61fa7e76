"""Cheaper ways to run the same step: each is planned as the step itself was, nothing is guessed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from volvelle.errors import VolvelleError
from volvelle.inspect.memory_cards import CardPlan, gigabytes
from volvelle.inspect.memory_options import Cards, Shard, StepOptions


@dataclass(frozen=True)
class Alternative:
    """A changed step: what changed, its peak in bytes on one card, and whether it fits (None without cards).

    `bound` says that the peak is only what weights, gradients and optimiser need at least: too much already.
    `remark` says why this saving was left out again.
    """

    change: str
    peak: int
    fits: bool | None
    bound: bool = False
    remark: str = ""

    def __str__(self) -> str:
        if self.remark:
            return f"{self.change}: left out, {self.remark}"
        verdict = "" if self.fits is None else ", fits" if self.fits else ", does not fit"
        return f"{self.change}: {'at least ' if self.bound else ''}{gigabytes(self.peak)}{verdict}"


Replan = Callable[[StepOptions, Shard], tuple[int, CardPlan | None]]


def alternatives(
    options: StepOptions, first: tuple[int, CardPlan | None], shard: Shard, parameters: int, replan: Replan
) -> list[Alternative]:
    """Add one saving after the other until the step fits; a step that fits already is shown the first saving only.

    The order is that of what they cost: time (checkpointing), communication (fsdp), precision (bf16), freedom (LoRA).
    A step whose weights, gradients and optimiser alone exceed the card is not traced, only its bound is given.
    """
    found: list[Alternative] = []
    done: list[str] = []
    best, card = first
    cards, enough = (None, True) if card is None else (card.cards, card.fits)
    for name, change in _savings(options, cards, shard):
        changed, changed_shard = change(options, shard)
        bound = at_least(changed, parameters) // (cards.count if cards is not None and changed_shard == "fsdp" else 1)
        if cards is not None and bound > cards.capacity:
            done.append(name)
            found.append(Alternative(" + ".join(done), bound, False, bound=True))
            options, shard = changed, changed_shard
            continue
        try:
            peak, card = replan(changed, changed_shard)
        except VolvelleError as error:
            found.append(Alternative(name, 0, None, remark=str(error)))
            continue
        if peak >= best:
            found.append(Alternative(name, peak, None, remark="it lowers this peak by nothing"))
            continue
        best, options, shard = peak, changed, changed_shard
        done.append(name)
        found.append(Alternative(" + ".join(done), peak, None if card is None else card.fits))
        if enough or card is None or card.fits:
            break
    return found


def at_least(options: StepOptions, parameters: int) -> int:
    """Bytes of weights, and of gradients and optimiser when all weights train; no activations.

    >>> at_least(StepOptions(precision="bf16-master"), 10**9) / 1e9
    20.0
    """
    each = 4 if options.precision in ("fp32", "amp") else 2
    if options.method != "full":
        return each * parameters
    states = {"adamw": 2, "adamw-foreach": 2, "momentum": 1}.get(options.optimizer, 0)
    if "master" in options.precision:
        return (each + each + 4 + 4 + 4 * states) * parameters
    return each * (2 + states) * parameters


Change = Callable[[StepOptions, Shard], tuple[StepOptions, Shard]]


def _savings(options: StepOptions, cards: Cards | None, shard: Shard) -> Iterator[tuple[str, Change]]:
    if not options.checkpointing:
        yield "checkpointing", lambda o, s: (dataclasses.replace(o, checkpointing=True), s)
    if cards is not None and cards.count > 1 and shard == "ddp":
        yield "shard=fsdp", lambda o, s: (o, "fsdp")
    if options.precision != "bf16":
        yield "precision=bf16", lambda o, s: (dataclasses.replace(o, precision="bf16"), s)
    if options.method == "full":
        yield "method=lora", lambda o, s: (dataclasses.replace(o, method="lora"), s)
