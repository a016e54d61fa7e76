"""Reading batches ahead of time, in threads or in processes, and giving them out in the order they were asked for.

A worker that fails, dies or is killed is an error that names what it was reading; nothing waits for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Literal, Protocol

from volvelle.data.transport import Channel, Message
from volvelle.data.worker_process import Load, Task, work
from volvelle.errors import VolvelleError

Kind = Literal["threads", "processes"]
_CAN_BLOCK = hasattr(signal, "pthread_sigmask")
_PATIENCE = 2.0  # seconds in which a killed worker must be gone


class Pool(Protocol):
    """Workers that read batches. `submit` returns a ticket at once; `take` waits for what it stands for."""

    def submit(self, key: str, ids: Sequence[int]) -> int:
        """Ask for these samples; returns the ticket."""
        ...

    def take(self, ticket: int) -> Any:
        """The collated value; raises what reading it raised."""
        ...

    def close(self) -> None:
        """End the workers without waiting for what they are doing. A second call does nothing."""
        ...

    def abandon(self) -> None:
        """The same, for finalisers: returns at once."""
        ...


def ahead(pool: Pool, wanted: Iterable[tuple[str, Sequence[int]]], window: int) -> Iterator[Any]:
    """The value of every (key, ids) in order, with at most `window` of them being read or waiting at any time."""
    rest = iter(wanted)
    tickets = deque(pool.submit(*one) for one in itertools.islice(rest, window))
    while tickets:
        value = pool.take(tickets.popleft())
        tickets.extend(pool.submit(*one) for one in itertools.islice(rest, 1))
        yield value


class ThreadPool:
    """Reads in threads of this process: nothing is copied, and what holds the interpreter's lock takes turns."""

    def __init__(self, load: Load, count: int):
        self._tasks: queue.SimpleQueue[tuple[Task, Future] | None] = queue.SimpleQueue()
        self._results: dict[int, Future] = {}
        self._numbers = itertools.count()
        self._closed = threading.Event()
        # Daemons: a read that never returns must not keep the program from ending.
        self._threads = [
            threading.Thread(target=_serve, args=(self._tasks, load, self._closed), name=f"loader-{i}", daemon=True)
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, key: str, ids: Sequence[int]) -> int:
        """Ask for these samples."""
        ticket = next(self._numbers)
        self._results[ticket] = Future()
        self._tasks.put((Task(ticket, key, ids), self._results[ticket]))
        return ticket

    def take(self, ticket: int) -> Any:
        """Wait for a value."""
        return self._results.pop(ticket).result()

    def close(self) -> None:
        """Let every thread end after the sample it is at."""
        if not self._closed.is_set():
            self._closed.set()
            for _ in self._threads:
                self._tasks.put(None)

    abandon = close


def _serve(tasks: queue.SimpleQueue[tuple[Task, Future] | None], load: Load, closed: threading.Event) -> None:
    def check(_: int) -> None:
        if closed.is_set():
            raise VolvelleError("the loader was closed")

    while (found := tasks.get()) is not None:
        task, future = found
        try:
            future.set_result(load(task, check))
        except BaseException as error:  # noqa: BLE001 - it belongs to the thread that takes the result
            future.set_exception(error)
        del found, task, future  # or this frame keeps a whole batch alive while it waits


class _Worker:
    def __init__(self, context: Any, number: int, load: Load):
        ours, theirs = context.Pipe(duplex=True)
        self.number = number
        self.current = context.RawValue(ctypes.c_longlong, -1)
        parent = None if context.get_start_method() == "forkserver" else os.getpid()
        arguments = (theirs, load, self.current, parent)
        self.process = context.Process(target=work, args=arguments, name=f"loader-{number}", daemon=True)
        with warnings.catch_warnings():
            # Python 3.12 warns of forking beside threads. The child touches no lock of theirs: it runs `work` only.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            self.process.start()
        theirs.close()
        self.channel = Channel(ours)
        self.pending: set[int] = set()


class ProcessPool:
    """Reads in processes: true parallelism for Python code, at the price of sending every batch.

    `describe([i])` names a sample in messages. Processes are forked on Linux and spawned elsewhere, unless the program
    chose with `multiprocessing.set_start_method`. They see the dataset as it was when they started.
    """

    def __init__(self, load: Load, count: int, describe: Callable[[Sequence[int]], str]):
        method = multiprocessing.get_start_method(allow_none=True)
        context = multiprocessing.get_context(method or ("fork" if sys.platform == "linux" else "spawn"))
        self._describe, self._owner, self._closed = describe, os.getpid(), False
        self._numbers = itertools.count()
        self._results: dict[int, Message] = {}
        self._asked: dict[int, Sequence[int]] = {}
        self._failure: VolvelleError | None = None
        # Reentrant both: a finaliser may call us in the middle of ourselves.
        self._changed, self._reaping = threading.Condition(), threading.RLock()
        self._workers: list[_Worker] = []
        self._collector: threading.Thread | None = None
        try:
            with _interrupts_held(forked=method != "forkserver"):
                for number in range(count):
                    self._workers.append(_Worker(context, number, load))
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception):
                raise
            if isinstance(error, OSError):
                raise VolvelleError(f"loader: cannot start a worker process: {error}", tip="fewer workers") from error
            raise VolvelleError(
                f"loader: the dataset cannot be sent to a worker process: {type(error).__name__}: {error}",
                tip="define its classes and functions at the top level of a module, or use workers=threads",
            ) from error
        # Only this thread receives and only the caller's sends: a full pipe in one direction never blocks the other.
        self._collector = threading.Thread(target=self._collect, name="loader-collect", daemon=True)
        self._collector.start()

    @property
    def process_ids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.process.pid for worker in self._workers]

    def submit(self, key: str, ids: Sequence[int]) -> int:
        """Give these samples to the worker with the least to do."""
        ticket = next(self._numbers)
        with self._changed:
            if self._closed:
                raise VolvelleError("the loader was closed")
            worker = min(self._workers, key=lambda one: len(one.pending))
            worker.pending.add(ticket)
            self._asked[ticket] = ids
        # A worker that is gone is reported by `take`, with what it was doing.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.channel.connection.send(Task(ticket, key, ids))
        return ticket

    def take(self, ticket: int) -> Any:
        """Wait for a value, or for the death of a worker."""
        with self._changed:
            while ticket not in self._results:
                if self._closed:
                    raise VolvelleError("the loader was closed")
                if self._failure:
                    raise self._failure
                self._changed.wait()
            message, ids = self._results.pop(ticket), self._asked.pop(ticket)
        if message.refused:
            warnings.warn(
                f"loader: shared memory refused ({message.refused}); batches go through a pipe, which is slower",
                RuntimeWarning,
                stacklevel=2,
            )
        if message.failed:
            raise message.value.error(self._batch_of(ids) if message.value.whole else "")
        return message.value

    def _batch_of(self, ids: Sequence[int]) -> str:
        more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
        with contextlib.suppress(Exception):  # the dataset's own code
            return f"; the batch holds {self._describe(ids[:3])}{more}"
        return f"; the batch holds sample {', '.join(map(str, ids[:3]))}{more}"

    def abandon(self) -> None:
        """Kill the workers and return; the collecting thread does the rest.

        For finalisers: a Ctrl-C that arrives in one is lost, so there is next to nothing here to arrive in. A worker
        has nothing to tidy up, it holds no lock and no file of ours.
        """
        if self._closed or os.getpid() != self._owner:  # a forked copy of this object owns no worker
            return
        self._closed = True
        for worker in self._workers:
            worker.process.kill()

    def close(self) -> None:
        """Kill the workers and wait until they are gone."""
        self.abandon()
        if os.getpid() != self._owner:
            return
        with self._changed:
            self._changed.notify_all()
        # The garbage collector may call this in any thread, the collecting one included.
        if self._collector is None:
            for worker in self._workers:
                self._exit_code(worker.process)
                worker.channel.close()
        elif self._collector is not threading.current_thread():
            self._collector.join(_PATIENCE)

    def _collect(self) -> None:
        """Receive until every worker is gone, however it went."""
        live = list(self._workers)
        while live:
            waited = [one.channel.connection for one in live] + [one.process.sentinel for one in live]
            ready = multiprocessing.connection.wait(waited)
            for worker in list(live):
                if worker.channel.connection in ready or worker.process.sentinel in ready:
                    try:
                        self._drain(worker, ended=worker.process.sentinel in ready)
                    except (EOFError, OSError):
                        live.remove(worker)
                        self._died(worker)
        for worker in self._workers:
            worker.channel.close()

    def _drain(self, worker: _Worker, *, ended: bool) -> None:
        """Receive what is there. EOFError when the worker ended and nothing is left of it."""
        while worker.channel.connection.poll():
            message = worker.channel.receive()
            with self._changed:
                worker.pending.discard(message.number)
                self._results[message.number] = message
                self._changed.notify_all()
        if ended:
            raise EOFError

    def _exit_code(self, process: Any) -> int | None:
        """Wait a little for a process to end; None when it has not.

        The system tells the exit code to one thread only, and any thread that starts a process may be that one.
        """
        end = time.monotonic() + _PATIENCE
        with self._reaping:
            process.join(_PATIENCE)
            while process.exitcode is None and time.monotonic() < end:
                time.sleep(0.01)
            return process.exitcode

    def _died(self, worker: _Worker) -> None:
        sample, (how, tip) = worker.current.value, _end(self._exit_code(worker.process))
        doing = "between two samples"
        if sample >= 0:
            doing = f"while reading sample {sample}"
            with contextlib.suppress(Exception):  # the dataset's own code; this thread must not die of it
                doing = f"while reading {self._describe([sample])}"
        name = f"loader worker {worker.number} (process {worker.process.pid})"
        with self._changed:
            self._failure = self._failure or VolvelleError(f"{name} {how} {doing}", tip=tip)
            self._changed.notify_all()


@contextlib.contextmanager
def _interrupts_held(*, forked: bool) -> Iterator[None]:
    """Keep Ctrl-C back while processes start, and let it come afterwards.

    Python runs its at-fork hooks like finalisers: what is raised in them is printed and lost. And a child must not be
    interrupted before it could say that it ignores it, so it is born with the signal blocked (see `work`).
    """
    arrived: list[int] = []
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if forked and _CAN_BLOCK else None
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if main else None
    if callable(before):
        signal.signal(signal.SIGINT, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        if blocked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if callable(before):
            signal.signal(signal.SIGINT, before)
        if arrived:
            signal.raise_signal(signal.SIGINT)


def _end(code: int | None) -> tuple[str, str | None]:
    """How a process ended, in words, and what to try."""
    if code is None:
        return "closed its pipe", None
    if code >= 0:
        return f"ended with exit code {code}", "the dataset, or a library it uses, ended the process"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    tips = {
        "SIGKILL": "memory may have run out: try fewer workers, a smaller prefetch or a smaller batch",
        "SIGSEGV": "a library crashed on this sample: look at the file, or use workers=threads to debug it",
        "SIGBUS": "a file was cut short, or memory ran out, while it was mapped",
    }
    return f"was killed by {name}", tips.get(name)
