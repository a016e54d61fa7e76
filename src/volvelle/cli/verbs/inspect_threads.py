"""`volvelle inspect threads`: every thread of a running process, Python and native."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from volvelle.cli.console import result, say, table

if TYPE_CHECKING:
    from volvelle.inspect.threads import LiveThread

EXAMPLES = ("volvelle inspect threads pid=4711", "volvelle inspect threads pid=4711 stacks=true")


@dataclass(frozen=True)
class Options:
    """Which process, and how much of it."""

    pid: int | None = None
    """Process id; this command itself when left out, with a list of your other Python processes."""
    stacks: bool = False
    """Print every Python stack in full, not only its innermost call."""


def main(options: Options) -> int:
    """Print one row a thread, then what is missing and why."""
    from volvelle.inspect.threads import live_threads
    from volvelle.inspect.threads_kernel import python_processes

    report = live_threads(options.pid)
    kinds = [thread.kind for thread in report]
    python = "unknown how many" if "unknown" in kinds else str(kinds.count("python"))
    say(f"process {report.pid}: {len(kinds)} threads, {python} of them Python's; from {', '.join(report.sources)}")
    table(("id", "kind", "state", "CPU s", "core", "name", "where"), [_row(thread) for thread in report])
    for note in report.notes:
        say(f"note: {note}")
    if options.stacks:
        for thread in report:
            if thread.stack:
                say("", f"{thread.name} ({thread.native_id}), innermost call last", *(f"  {f}" for f in thread.stack))
    if options.pid is None and (others := python_processes()):
        say("", "your other Python processes:", *(f"  pid={pid}  {command[:100]}" for pid, command in others))
    threads = [{**asdict(thread), "cpu_seconds": thread.cpu_seconds} for thread in report]
    result({"pid": report.pid, "threads": threads, "sources": report.sources, "notes": report.notes})
    return 0


def _row(thread: LiveThread) -> tuple[object, ...]:
    seconds = thread.cpu_seconds
    where = ""
    if thread.stack:
        inner = thread.stack[-1]
        where = f"{inner.function} ({Path(inner.file).name}:{inner.line})"
    shown = None if seconds is None else f"{seconds:.2f}"
    return thread.native_id, thread.kind, thread.state, shown, thread.cpu, thread.name, where
