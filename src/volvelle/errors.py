"""Errors meant for the person at the keyboard: what went wrong, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VolvelleError(Exception):
    """A failure that the user can act on. The CLI prints `error: message` and `tip: tip`, without a traceback.

    `message` names the call, file or line, the rule, and what arrived; `tip`, when given, is the next thing to try.

    >>> error = VolvelleError("model.gguf: not a GGUF file", tip="download it again with: volvelle get smollm2")
    >>> str(error)
    'model.gguf: not a GGUF file'
    """

    exit_code = 1

    def __init__(self, message: str, *, tip: str | None = None):
        super().__init__(message)
        self.tip = tip


class UsageError(VolvelleError):
    """The command line or an option is wrong: exit code 2."""

    exit_code = 2


def did_you_mean(word: str, known: Iterable[str], *, limit: int = 3) -> str | None:
    """Return a tip that lists the names closest to `word`, or None when none is near; capitals do not matter.

    >>> did_you_mean("lroa", ["lora", "prefix", "full"])
    'did you mean lora?'
    """
    by_lower = {name.lower(): name for name in known}
    close = [by_lower[key] for key in difflib.get_close_matches(word.lower(), by_lower, n=limit, cutoff=0.5)]
    return f"did you mean {' or '.join(close)}?" if close else None
