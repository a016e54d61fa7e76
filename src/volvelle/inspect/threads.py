"""Every thread of a running process, Python and native: the kernel's list joined with the interpreter's.

`threading.enumerate` misses the threads of OpenMP, of autograd and of other C libraries; /proc misses names and Python
stacks. The native id is what both know.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from volvelle.errors import VolvelleError
from volvelle.inspect.threads_kernel import PROC, KernelThread, kernel_threads, native_ids
from volvelle.inspect.threads_peek import Answer, Frame, PythonThread, ask, own_threads

Kind = Literal["python", "native", "unknown"]


@dataclass(frozen=True)
class LiveThread:
    """One thread. `kind` is "unknown" where no interpreter could be asked; times are seconds of CPU since its start.

    `name` is Python's where there is one, else the kernel's; `stack` ends with the innermost call. What no source
    knows is None.
    """

    native_id: int | None
    name: str
    kind: Kind
    state: str | None = None
    user_seconds: float | None = None
    system_seconds: float | None = None
    cpu: int | None = None
    """The core it last ran on."""
    ident: int | None = None
    """The interpreter's number of the thread (`threading.get_ident`)."""
    daemon: bool | None = None
    stack: tuple[Frame, ...] = ()

    @property
    def cpu_seconds(self) -> float | None:
        """User and system time together."""
        if self.user_seconds is None or self.system_seconds is None:
            return None
        return self.user_seconds + self.system_seconds


@dataclass(frozen=True)
class ThreadReport:
    """The threads of process `pid`, where the facts come from, and what is missing and why."""

    pid: int
    threads: tuple[LiveThread, ...]
    sources: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self):
        return iter(self.threads)

    def __len__(self) -> int:
        return len(self.threads)


def live_threads(pid: int | None = None) -> ThreadReport:
    """Every thread of a process: name, native id, CPU time, state, Python stack. None means this process.

    Another process's Python stacks come from the process itself when it called `answer_threads`, else from py-spy when
    that is installed; `notes` says so when there is no source. Raises VolvelleError when there is no such process, or
    when it may not be looked at.

    >>> main = live_threads().threads[0]
    >>> main.name, main.kind
    ('MainThread', 'python')
    """
    own = pid is None or pid == os.getpid()
    number = os.getpid() if pid is None else pid
    kernel, notes = _kernel(number, own)
    answer = Answer(own_threads(), "the interpreter") if own else _asked(number)
    python = _with_native_ids(answer.threads, kernel) if own and kernel else answer.threads
    by_native = {thread.native_id: thread for thread in python if thread.native_id is not None}
    threads = [_join(one, by_native.pop(one.native_id, None), bool(python)) for one in kernel]
    # Ended between the two readings, or without a native id: the interpreter's word alone.
    left = [*by_native.values(), *(thread for thread in python if thread.native_id is None)]
    threads += [_python_only(thread) for thread in left if not kernel or thread.native_id is None]
    sources = ([str(PROC)] if kernel else []) + ([answer.source] if answer.source else [])
    return ThreadReport(number, tuple(threads), tuple(sources), (*notes, *answer.notes))


def _kernel(pid: int, own: bool) -> tuple[list[KernelThread], tuple[str, ...]]:
    if not (PROC / "self" / "task").is_dir():
        if own:
            return [], ("no /proc on this system: native threads, CPU times and states are missing",)
        raise VolvelleError(
            f"live_threads: cannot look at process {pid}: this system has no /proc",
            tip="on Linux every process can be seen; elsewhere only the calling one",
        )
    try:
        return kernel_threads(pid), ()
    except FileNotFoundError as error:
        raise VolvelleError(
            f"live_threads: there is no process {pid}", tip="list your Python processes with: volvelle inspect threads"
        ) from error
    except PermissionError as error:
        raise VolvelleError(
            f"live_threads: no permission to look at process {pid}", tip="ask as the user who runs it, or as root"
        ) from error


def _asked(pid: int) -> Answer:
    try:
        return ask(pid)
    except ConnectionAbortedError as error:
        return Answer([], "", (f"no Python stacks: {error}",))


def _with_native_ids(python: Sequence[PythonThread], kernel: Sequence[KernelThread]) -> list[PythonThread]:
    known = {thread.ident: thread.native_id for thread in python if thread.native_id is not None}
    free = {thread.native_id for thread in kernel} - set(known.values())
    found = native_ids([t.ident for t in python if t.native_id is None], known, free)
    return [replace(t, native_id=found.get(t.ident, t.native_id)) for t in python]


def _join(kernel: KernelThread, python: PythonThread | None, asked: bool) -> LiveThread:
    common = {
        "native_id": kernel.native_id,
        "state": kernel.state,
        "user_seconds": kernel.user_seconds,
        "system_seconds": kernel.system_seconds,
        "cpu": kernel.cpu,
    }
    if python is None:
        return LiveThread(name=kernel.name, kind="native" if asked else "unknown", **common)
    name = python.name or kernel.name
    return LiveThread(name=name, kind="python", ident=python.ident, daemon=python.daemon, stack=python.stack, **common)


def _python_only(thread: PythonThread) -> LiveThread:
    return LiveThread(
        thread.native_id,
        thread.name or "(no name)",
        "python",
        ident=thread.ident,
        daemon=thread.daemon,
        stack=thread.stack,
    )
