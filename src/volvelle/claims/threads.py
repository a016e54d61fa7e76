"""Threads against processes: what runs at once in each, what creating and switching costs, and what is shared.

Every figure of time is the median of interleaved rounds on this machine; the work itself is in the standard library.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import select
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

CLAIM = Claim(
    title="Threads and processes",
    family="data",
    paper=Paper(
        "Beazley",
        2010,
        "Understanding the Python GIL",
        "slides 4 to 12",
        "https://www.dabeaz.com/python/UnderstandingGIL.pdf",
    ),
    sentence="threads of one interpreter overlap while they wait or run C code that lets the lock go, but take turns "
    "in Python code, where only processes run in parallel; threads share the heap, processes do not",
    measured_by="the same work done in turn, in threads and in processes, in interleaved rounds; the cost of creating "
    "one and of handing over between two; a list that each of them appends to",
    summary="When to use threads and when processes: by what the work waits for, and by what it costs to start, "
    "switch and share.",
    summary_zh="何时用线程、何时用进程：取决于工作在等待什么，以及创建、切换和共享的代价。",
    seconds={"quick": 45, "full": 240},
    parts=(),
    recipe="volvelle inspect threads",
)

_WORKERS = 2
_WAIT = 0.1  # seconds of the I/O-bound work: a reply that is on its way
_heap: list[int] = []


def wait(_: int) -> None:
    """I/O-bound: wait for a pipe that stays silent, as for a slow disk or a server."""
    reader, writer = os.pipe()
    select.select([reader], [], [], _WAIT)
    os.close(reader)
    os.close(writer)


def count(n: int) -> int:
    """CPU-bound in Python: the interpreter's lock is held throughout."""
    total = 0
    for i in range(n):
        total += i * i % 7
    return total


def digest(n: int) -> str:
    """CPU-bound in C: hashing lets the interpreter's lock go."""
    return hashlib.sha256(bytes(n)).hexdigest()


def measure(budget: Budget) -> Measurement:
    """Measure overlap, creation, switching and sharing."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if sys.platform == "win32":
        return Measurement(unmeasurable="needs fork and pipes between threads (a POSIX system)")
    rounds, load = 5 if budget == "quick" else 15, os.getloadavg()[0]
    quiet = cores >= _WORKERS and load <= cores
    context = multiprocessing.get_context("fork")
    free = getattr(sys, "_is_gil_enabled", lambda: True)() is False
    with context.Pool(_WORKERS) as processes, ThreadPoolExecutor(_WORKERS) as threads:
        pools = {"threads": threads.map, "processes": processes.map}
        waiting = _speed(wait, [0] * 8, pools, rounds)
        python = _speed(count, [_calibrated(count)] * 8, pools, rounds)
        native = _speed(digest, [_calibrated(digest)] * 8, pools, rounds)
    findings = _overlap(waiting, python, native, quiet=quiet, free=free)
    findings += _costs(context, rounds)
    findings += _sharing(context)
    notes = []
    if not quiet:
        why = "one core" if cores < _WORKERS else f"the machine was busy (load {load:.1f} on {cores} cores)"
        notes.append(f"{why}: speed-ups of CPU-bound work are reported, not judged")
    notes += ["this interpreter has no global lock: threads may run Python code in parallel"] if free else []
    setting = {
        "workers": _WORKERS,
        "cores": cores,
        "rounds": rounds,
        "load at start": round(load, 1),
        "start": "fork",
        "pieces of work": 8,
    }
    return Measurement(findings, setting=setting, notes=notes, peers={"python": sys.version.split()[0]})


def _calibrated(work: Callable[[int], object], seconds: float = 0.05) -> int:
    """The size that keeps `work` busy for about `seconds`."""
    n = 10_000
    while True:
        begin = time.perf_counter()
        work(n)
        took = time.perf_counter() - begin
        if took > seconds / 4:
            return int(n * seconds / took)
        n *= 4


def _speed(
    work: Callable[[int], object], pieces: list[int], pools: dict[str, Callable], rounds: int
) -> dict[str, list[float]]:
    """Speed-up over doing the pieces in turn: a ratio a round, after a warm-up."""
    ratios: dict[str, list[float]] = {name: [] for name in pools}
    for number in range(rounds + 1):
        begin = time.perf_counter()
        for piece in pieces:
            work(piece)
        alone = time.perf_counter() - begin
        for name, run in pools.items():
            begin = time.perf_counter()
            list(run(work, pieces))
            if number:
                ratios[name].append(alone / (time.perf_counter() - begin))
    return ratios


def _overlap(
    waiting: dict[str, list[float]],
    python: dict[str, list[float]],
    native: dict[str, list[float]],
    *,
    quiet: bool,
    free: bool,
) -> list[Finding]:
    def found(what: str, ratios: list[float], judge: Callable | None, bound: float) -> Finding:
        middle, spread = statistics.median(ratios), (min(ratios), max(ratios))
        text = f"{what}, speed-up of {_WORKERS}"
        return judge(text, middle, bound, "x", spread=spread) if judge else Finding(text, middle, "x", spread=spread)

    some, most = (at_least, at_most) if quiet else (None, None)
    return [
        found("waiting, threads", waiting["threads"], at_least, 1.8),
        found("waiting, processes", waiting["processes"], at_least, 1.8),
        found("Python code, threads", python["threads"], None if free else most, 1.2),
        found("Python code, processes", python["processes"], some, 1.4),
        found("C code without the lock, threads", native["threads"], some, 1.4),
        found("C code without the lock, processes", native["processes"], some, 1.4),
    ]


def _costs(context: Any, rounds: int) -> list[Finding]:
    """Microseconds to create and join one, and to hand over to another and back."""
    makers: dict[str, Callable[..., Any]] = {"thread": threading.Thread, "process": context.Process}
    create: dict[str, list[float]] = {name: [] for name in makers}
    switch: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds):
        for name, make in makers.items():
            create[name].append(_creation(make, 40 if name == "thread" else 10))
            switch[name].append(_ping_pong(make, 300))
    middle = {name: statistics.median(values) for name, values in create.items()}
    findings = [
        Finding(f"create and join a {name}", middle[name], "µs", spread=(min(create[name]), max(create[name])))
        for name in makers
    ]
    ratio = [p / t for p, t in zip(create["process"], create["thread"], strict=True)]
    spread = (min(ratio), max(ratio))
    findings.append(at_least("creating: process over thread", statistics.median(ratio), 3, "x", spread=spread))
    for name in makers:
        spread = (min(switch[name]), max(switch[name]))
        value = statistics.median(switch[name])
        findings.append(Finding(f"there and back through a pipe, to a {name}", value, "µs", spread=spread))
    return findings


def _creation(make: Callable[..., Any], times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        one = make(target=int)
        one.start()
        one.join()
    return (time.perf_counter() - begin) / times * 1e6


def _ping_pong(make: Callable[..., Any], times: int) -> float:
    """One byte over a pipe and one back: two switches, and for threads two hand-overs of the interpreter's lock."""
    there, back = os.pipe(), os.pipe()
    other = make(target=_answer, args=(there[0], back[1], times))
    other.start()
    begin = time.perf_counter()
    for _ in range(times):
        os.write(there[1], b"x")
        os.read(back[0], 1)
    took = time.perf_counter() - begin
    other.join()
    for end in (*there, *back):
        os.close(end)
    return took / times * 1e6


def _answer(reader: int, writer: int, times: int) -> None:
    for _ in range(times):
        os.write(writer, os.read(reader, 1))


def _sharing(context: Any) -> list[Finding]:
    """A list that a thread and a process append to, and a file that a process writes."""
    _heap.clear()
    thread = threading.Thread(target=_heap.append, args=(1,))
    thread.start()
    thread.join()
    by_thread = list(_heap)
    process = context.Process(target=_heap.append, args=(2,))
    process.start()
    process.join()
    by_process = list(_heap)
    _heap.clear()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sent"
        process = context.Process(target=path.write_text, args=("3",))
        process.start()
        process.join()
        sent = path.read_text() == "3"
    shared, apart = by_thread == [1], by_process == by_thread
    return [
        Finding("what a thread appends to a list is there", str(shared), bound="true", held=shared),
        Finding("what a process appends to its copy is not", str(apart), bound="true", held=apart),
        Finding("what a process sends explicitly arrives", str(sent), bound="true", held=sent),
    ]
