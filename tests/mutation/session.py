"""A session of pytest that collects the tests once and tries every mutant in a fork of that state.

Collecting and importing take seconds, most tests milliseconds. A first fork runs every test with coverage and notes
which lines it reaches and how long it takes. A mutant is then tried by the tests that reach its statement, the quickest
first, until one fails. Limits are of processor time, so that a busy machine decides nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import coverage
import pytest
from _pytest.runner import runtestprotocol
from tests.mutation.exchange import NotApplied, exchange
from tests.mutation.mutants import Mutant, path_of

BUDGET = 6.0
"""Seconds of tests that a mutant is tried with at most."""
KILLED, SURVIVED, NOT_APPLIED = 1, 0, 3


class Verdict(NamedTuple):
    """What became of a mutant: killed by a test (`by`, "time" for one that did not end), or not by any of `tried`."""

    mutant: Mutant
    killed: bool
    by: str
    tried: int


class Reached(NamedTuple):
    """Of each test its seconds; of each file and line the tests that ran it. Tests are numbers."""

    seconds: dict[int, float]
    lines: dict[str, dict[int, set[int]]]


class Trial:
    """The plugin: tries `mutants` with the collected tests; `verdicts` are there when the session has ended."""

    def __init__(self, mutants: Sequence[Mutant], jobs: int, told: Callable[[Verdict], None]) -> None:
        self.mutants, self.jobs, self.told = mutants, jobs, told
        self.verdicts: list[Verdict] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Instead of the tests: the mutants."""
        if session.testsfailed:
            raise session.Failed("the tests cannot be collected")
        items = session.items
        reached = _reached(items, sorted({mutant.file for mutant in self.mutants}))
        waiting = list(reversed(self.mutants))
        running: dict[int, tuple[Mutant, list[pytest.Item], Path]] = {}
        with tempfile.TemporaryDirectory() as folder:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    mutant = waiting.pop()
                    chosen = _chosen(mutant, items, reached)
                    note = Path(folder) / str(len(waiting))
                    seconds = sum(reached.seconds[i] for i in chosen)
                    tests = [items[i] for i in chosen]
                    running[_fork(lambda m=mutant, t=tests: _try(m, t), note, 5 + 3 * seconds)] = mutant, tests, note
                pid, status = os.wait()
                mutant, tests, note = running.pop(pid)
                verdict = _verdict(mutant, tests, note, status)
                self.verdicts.append(verdict)
                self.told(verdict)
        return True


def _verdict(mutant: Mutant, tests: Sequence[pytest.Item], note: Path, status: int) -> Verdict:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return Verdict(mutant, True, "time" if number == signal.SIGXCPU else signal.Signals(number).name, len(tests))
    if os.WEXITSTATUS(status) == NOT_APPLIED:
        raise NotApplied(note.read_text())
    return Verdict(mutant, os.WEXITSTATUS(status) != SURVIVED, note.read_text(), len(tests))


def _fork(work: Callable[[], tuple[int, str]], note: Path, seconds: float) -> int:
    """Run `work` in a fork: it gives the exit status and what is written to `note`. Its output goes nowhere."""
    note.touch()
    pid = os.fork()
    if pid:
        return pid
    code, said = 2, ""
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 1,) * 2)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        code, said = work()
    except BaseException:  # noqa: BLE001 — a fork must not return into pytest
        said = traceback.format_exc()
    finally:
        note.write_text(said)
        os._exit(code)


def _run(item: pytest.Item, following: pytest.Item | None) -> str:
    """Run one test: "passed", "skipped" or "failed"."""
    reports = runtestprotocol(item, nextitem=following, log=False)
    if any(report.failed for report in reports):
        return "failed"
    return "skipped" if any(report.skipped for report in reports) else "passed"


def _try(mutant: Mutant, tests: Sequence[pytest.Item]) -> tuple[int, str]:
    try:
        exchange(mutant)
    except NotApplied as error:
        return NOT_APPLIED, str(error)
    for test, following in zip(tests, [*tests[1:], None], strict=True):
        if _run(test, following) == "failed":
            return KILLED, test.nodeid
    return SURVIVED, ""


def _reached(items: Sequence[pytest.Item], files: Sequence[str]) -> Reached:
    """Run all tests once, unchanged, in a fork. Those that skip take no part; one that fails ends the session."""

    before = set(sys.modules)

    def work() -> tuple[int, str]:
        paths = {file: str(path_of(file)) for file in files}
        cov = coverage.Coverage(data_file=None, config_file=False, include=list(paths.values()))
        cov.start()
        seconds: dict[int, float] = {}
        failed: list[str] = []
        for i, item in enumerate(items):
            cov.switch_context(str(i))
            begin = time.process_time()
            outcome = _run(item, items[i + 1] if i + 1 < len(items) else None)
            if outcome == "passed":
                seconds[i] = time.process_time() - begin
            elif outcome == "failed":
                failed.append(item.nodeid)
        cov.stop()
        data = cov.get_data()
        lines = {file: data.contexts_by_lineno(path) for file, path in paths.items()}
        loaded = sorted(set(sys.modules) - before)
        return SURVIVED, json.dumps({"seconds": seconds, "failed": failed, "lines": lines, "loaded": loaded})

    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "reached"
        _, status = os.waitpid(_fork(work, note, 3600.0), 0)
        said = note.read_text()
    if status:
        raise RuntimeError(f"the tests could not be run once: {said or status}")
    found = json.loads(said)
    if found["failed"]:
        raise RuntimeError("these tests fail without any mutant: " + ", ".join(found["failed"]))
    for name in found["loaded"]:  # peers and compilers: imported once here, not in every fork
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    seconds = {int(i): spent for i, spent in found["seconds"].items()}
    lines = {
        file: {int(line): {int(i) for i in tests if i and int(i) in seconds} for line, tests in by_line.items()}
        for file, by_line in found["lines"].items()
    }
    return Reached(seconds, lines)


def _chosen(mutant: Mutant, items: Sequence[pytest.Item], reached: Reached) -> list[int]:
    """The tests of a mutant, the quickest first. Of what only an import runs (a constant), all that reach the file."""
    by_line = reached.lines[mutant.file]
    first, last = mutant.lines
    tests = set().union(*(by_line.get(line, set()) for line in range(first, last + 1)))
    tests = tests or (set().union(*by_line.values()) if not _runs(mutant) else set())
    chosen, spent = [], 0.0
    for i in sorted(tests, key=lambda i: (reached.seconds[i], i)):
        spent += reached.seconds[i]
        if chosen and spent > BUDGET:
            break
        chosen.append(i)
    return chosen


def _runs(mutant: Mutant) -> bool:
    """Whether the mutated line runs when a function is called, and not once when the module is imported."""
    head = mutant.was.startswith(("def ", "class ", "@")) or mutant.was.endswith(",")
    return bool(mutant.function) and mutant.function.split(".")[-1][0].islower() and not head
