"""Plan in a process of its own, so that a crash in native code ends that process and becomes an error message."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from volvelle.errors import VolvelleError

T = TypeVar("T")


def isolated(work: Callable[[], T]) -> T:
    """Run `work()` in a forked process and return its result, which must be picklable; its exception is raised here.

    The process computes with one thread: those of this one are not in it, and a parallel region would wait for them for
    ever. Where a system cannot fork, the work runs here. Raises VolvelleError when the process dies, with the signal
    that ended it.

    >>> isolated(lambda: 6 * 7)
    42
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return work()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(work, sender), daemon=True)
    process.start()
    sender.close()
    try:
        kind, value = receiver.recv()
    except EOFError:
        process.join()
        raise VolvelleError(
            f"plan_memory: the planning process ended {_how(process.exitcode)} before it had a result",
            tip="a native operation cannot run on fake tensors; VOLVELLE_DEBUG=1 shows where",
        ) from None
    finally:
        receiver.close()
    process.join()
    if kind == "error":
        raise value
    return value


def _answer(work: Callable[[], Any], sender: Any) -> None:
    try:
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
        message = ("result", work())
    except Exception as error:  # noqa: BLE001 - it is raised again in the caller
        message = ("error", error)
    sender.send(message)
    sender.close()


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"by {signal.Signals(-code).name}"
    return f"with exit code {code}"
