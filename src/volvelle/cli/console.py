"""What verbs print with: human text on stdout, one JSON object instead with --json, progress and warnings on stderr.

With --json everything meant for people goes to stderr, so that stdout holds exactly one JSON object.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from volvelle.hub.progress import megabytes
from volvelle.runs import plain

# Set by cli.main for the verb it calls; a context variable, so that tests and threads do not share it by accident.
_json = contextvars.ContextVar("volvelle_json", default=False)


@contextlib.contextmanager
def json_output(wanted: bool) -> Iterator[None]:
    """Within the block, `result` prints JSON when `wanted` and `say` keeps off stdout."""
    token = _json.set(wanted)
    try:
        yield
    finally:
        _json.reset(token)


def wants_json() -> bool:
    """Return True when the user asked for --json."""
    return _json.get()


def say(*lines: object) -> None:
    """Print lines for people, at once (also in a pipe)."""
    for line in lines or ("",):
        print(line, file=_human(), flush=True)


def write(text: str) -> None:
    """Print a piece of text without a line end, at once: streamed tokens."""
    stream = _human()
    stream.write(text)
    stream.flush()


def warn(message: str) -> None:
    """Print a warning on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def result(record: Mapping[str, Any]) -> None:
    """Print the verb's result as one JSON object, when --json asks for it; otherwise nothing (say it in words too)."""
    if wants_json():
        print(json.dumps(plain(record), ensure_ascii=False, allow_nan=False), flush=True)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
    """Print rows in aligned columns; on a terminal the last column is cut to the width. Numbers align right."""
    if title:
        say(title)
    cells = [[("" if cell is None else str(cell)) for cell in row] for row in rows]
    right = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(headers))]
    widths = [max(map(_width, column)) for column in zip(headers, *cells, strict=True)]
    room = shutil.get_terminal_size().columns if _human().isatty() else None
    for line in ([*headers], ["-" * width for width in widths], *cells):
        text = "  ".join(map(_pad, line, widths, right)).rstrip()
        say(text if room is None or _width(text) <= room else _cut(text, room))


class Progress:
    """Progress of one piece of work: `advance(n)`, or `update(done)`; `note` is shown behind the bar (a loss)."""

    def __init__(self, label: str, total: float | None, *, unit: str = "", interval: float = 5.0):
        self.label, self.total, self.unit, self.interval = label, total, unit, interval
        self.done = self.first = 0.0
        self.note = ""
        self.begun = self.printed = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Count `amount` more."""
        self.update(self.done + amount, note)

    def update(self, done: float, note: str | None = None) -> None:
        """Set how much is done, counted from the start of the work."""
        self.done = done
        self.note = self.note if note is None else note
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=self.text())
        elif time.monotonic() - self.printed >= self.interval:
            self._line()

    def resume(self, done: float) -> None:
        """Start at `done`, which an earlier run did: it does not count in the rate."""
        self.first = self.done = done

    def text(self) -> str:
        """Return the amount, the rate and the time left."""
        seconds = max(time.monotonic() - self.begun, 1e-9)
        rate = (self.done - self.first) / seconds
        text = f"{self._amount(self.done)}" + (f"/{self._amount(self.total)}" if self.total else "")
        text += f", {self._amount(rate) if self.unit == 'B' else f'{rate:.3g} {self.unit}'.strip()}/s"
        if self.total and rate > 0 and self.done < self.total:
            text += f", {duration((self.total - self.done) / rate)} left"
        return f"{text}, {self.note}" if self.note else text

    def _amount(self, value: float) -> str:
        return megabytes(int(value)) if self.unit == "B" else f"{value:g}"

    def _line(self) -> None:
        self.printed = time.monotonic()
        print(f"{self.label}: {self.text()}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(label: str, total: float | None = None, *, unit: str = "", interval: float = 5.0) -> Iterator[Progress]:
    """Show progress on stderr: a bar with rate and time left on a terminal, a plain line every `interval` s elsewhere.

    `unit` names what is counted ("step", "token"; "B" for bytes, shown in MB).
    """
    state = Progress(label, total, unit=unit, interval=interval)
    if not sys.stderr.isatty():
        yield state
        if state.done:
            state._line()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
    with Bar(*columns, console=Console(stderr=True)) as bar:
        state._bar, state._task = bar, bar.add_task(label, total=total, note="")
        yield state


class DownloadReport:
    """Shows the downloads of `hub.fetch` with `progress`; use as a context manager around the call."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> DownloadReport:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(self, label: str, total: int | None) -> None:
        """Open a bar for one file."""
        say(f"downloading {label}, {megabytes(total)}")
        self._progress = self._stack.enter_context(progress(label, total, unit="B"))
        self._started = False

    def update(self, done: int) -> None:
        """Move the bar."""
        if not self._started:
            self._progress.resume(done)
            self._started = True
        self._progress.update(done)

    def finish(self) -> None:
        """Close the bar."""
        self._stack.close()


def duration(seconds: float) -> str:
    """Return a time span for people.

    >>> duration(4.2), duration(75), duration(7260)
    ('4 s', '1 min 15 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _human() -> TextIO:
    return sys.stderr if wants_json() else sys.stdout


def _width(text: str) -> int:
    """Columns on a terminal: Chinese and other wide letters take two."""
    return len(text) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space


def _cut(text: str, room: int) -> str:
    while _width(text) > room - 1:
        text = text[:-1]
    return text + "…"
