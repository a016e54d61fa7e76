"""Telling the person at the keyboard how a download goes."""

from __future__ import annotations

import sys
import time
from typing import Protocol


class Report(Protocol):
    """What a download calls: once with the label and the total, then with the bytes so far, then at the end."""

    def start(self, label: str, total: int | None) -> None:
        """Announce the work: `total` in bytes, None when unknown."""
        ...

    def update(self, done: int) -> None:
        """Say that `done` bytes are there, counted from the start of the file."""
        ...

    def finish(self) -> None:
        """The bytes are all there, or the work was given up."""
        ...


class Silent:
    """Says nothing."""

    def start(self, label: str, total: int | None) -> None:
        """Do nothing."""

    def update(self, done: int) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class Lines:
    """One plain line on stderr at the start, then one every `interval` seconds with the rate and the time left."""

    def __init__(self, interval: float = 5.0):
        self.interval = interval

    def start(self, label: str, total: int | None) -> None:
        """Print the first line."""
        self.label, self.total = label, total
        self.begun = self.printed = time.monotonic()
        self.first: int | None = None
        print(f"downloading {label}, {megabytes(total)}", file=sys.stderr, flush=True)

    def update(self, done: int) -> None:
        """Print a line when the last one is old enough."""
        now = time.monotonic()
        if self.first is None:
            self.first = done
        if now - self.printed < self.interval:
            return
        self.printed = now
        rate = (done - self.first) / max(now - self.begun, 1e-9)
        text = f"{self.label}: {megabytes(done)} of {megabytes(self.total)}, {megabytes(int(rate))}/s"
        if self.total and rate > 0:
            text += f", {(self.total - done) / rate:.0f} s left"
        print(text, file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Say nothing more: the caller reports the result."""


def megabytes(size: int | None) -> str:
    """Size in decimal units, as package indexes print it.

    >>> megabytes(92_871_040), megabytes(91_860), megabytes(12), megabytes(None)
    ('92.9 MB', '91.9 kB', '12 B', 'unknown size')
    """
    if size is None:
        return "unknown size"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
