"""How the loop speaks: an observer is told what happens; the command line draws it, a library user may ignore it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

logger = logging.getLogger("volvelle.train")

SHOWN = 5
"""Lines that are said of what may be many."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `step` of `steps`, the newest metrics, the rate in `unit` a second, seconds left."""

    step: int
    steps: int
    metrics: Mapping[str, float]
    rate: float
    unit: str
    seconds_left: float

    @property
    def line(self) -> str:
        """One plain line: `step 20/100  loss 2.31  812 tokens/s  1:40 left`."""
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        minutes, seconds = divmod(int(self.seconds_left), 60)
        rate = f"{self.rate:,.0f} {self.unit}/s" if self.rate >= 10 else f"{self.rate:.2g} {self.unit}/s"
        return f"step {self.step}/{self.steps}  {numbers}  {rate}  {minutes}:{seconds:02d} left"


class Observer:
    """Hears of progress and of things worth saying. This one logs; the command line's draws a live line."""

    def say(self, text: str) -> None:
        """A fact the user should see: what was decided, a checkpoint skipped, an interrupt heard."""
        logger.warning("%s", text)

    def progress(self, progress: Progress) -> None:
        """One finished step."""
        logger.info("%s", progress.line)

    def work(self, label: str, done: int, total: int) -> None:
        """Part of something other than training steps: `done` of `total` outputs written."""
        logger.info("%s: %d of %d", label, done, total)


class Quiet(Observer):
    """Says nothing at all, for tests and benchmarks."""

    def say(self, text: str) -> None:
        """Drop it."""

    def progress(self, progress: Progress) -> None:
        """Drop it."""

    def work(self, label: str, done: int, total: int) -> None:
        """Drop it."""


def say_first(observer: Observer, lines: Sequence[str], word: str = "left out ") -> None:
    """Say the first few of many lines, each after `word`, and how many more there are.

    >>> class Loud(Quiet):
    ...     def say(self, text: str) -> None:
    ...         print(text)
    >>> say_first(Loud(), ["a.png: truncated", "b.png: no mask"])
      left out a.png: truncated
      left out b.png: no mask
    >>> say_first(Loud(), [str(number) for number in range(8)], "")  # doctest: +ELLIPSIS
      0
    ...
      and 3 more
    """
    for line in lines[:SHOWN]:
        observer.say(f"  {word}{line}")
    if len(lines) > SHOWN:
        observer.say(f"  and {len(lines) - SHOWN:,} more")
