"""Stop strings in streamed text: found across token boundaries, and never shown in part."""

from __future__ import annotations

from collections.abc import Sequence

from volvelle.errors import UsageError


class StopText:
    """Releases text as it comes, holding back what may be the beginning of a stop string.

    >>> text = StopText(["END"])
    >>> text.push("one E"), text.push("N"), text.push("C, EN"), text.push("D and more"), text.stopped
    ('one ', '', 'ENC, ', '', True)
    """

    def __init__(self, stop: Sequence[str] = ()):
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise UsageError(f"stop: expected a list of non-empty strings, got {stop!r}")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Take the next piece and return what is safe to show; nothing any more once a stop string was found."""
        if self.stopped:
            return ""
        text = self._held + piece
        if not self._stop:
            return text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max(_overlap(text, stop) for stop in self._stop)
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """Return what was held back: the text has ended, so it was no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` (shorter than all of it)."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
