"""Work in a process of its own that ends at once when nobody waits for its answer any more."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from volvelle.errors import VolvelleError
from volvelle.inspect.collectives_ranks import fresh_processes

GLANCE = 0.2
"""Seconds between two looks whether somebody still waits."""


class Gone(Exception):
    """Nobody waits for the answer."""


async def apart(
    program: Callable[..., Any], arguments: Sequence[Any], *, gone: Callable[[], Awaitable[bool]], limit: float = 180.0
) -> Any:
    """program(*arguments) in a fresh process: a function of a module's top level, its answer can be pickled.

    Raises what it raises, VolvelleError where its process dies or does not answer within `limit` seconds, and Gone,
    with the process ended, once `gone()` says so.
    """
    stop = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(_run, program, arguments, stop, limit))
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=GLANCE)
            if not task.done() and await gone():
                raise Gone
        return task.result()
    finally:
        stop.set()
        if not task.done():
            with contextlib.suppress(Gone, VolvelleError):
                await task


def _run(program: Callable[..., Any], arguments: Sequence[Any], stop: threading.Event, limit: float) -> Any:
    context, until = fresh_processes(program.__module__), time.monotonic() + limit
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, program, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        while not ours.poll(GLANCE / 2):
            if stop.is_set():
                raise Gone
            if time.monotonic() > until:
                raise VolvelleError(f"no answer within {limit:.0f} s")
        kind, value = ours.recv()
    except EOFError:
        raise VolvelleError("the process that computed this ended without an answer") from None
    finally:
        process.kill()
        process.join()
        ours.close()
    if kind == "error":
        raise value
    return value


def _answer(pipe: Any, program: Callable[..., Any], arguments: Sequence[Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches everybody; the caller ends this process
    try:
        message = ("value", program(*arguments))
    except Exception as error:  # noqa: BLE001 - it is raised again in the caller
        known = isinstance(error, VolvelleError | ValueError)
        text = VolvelleError(str(error)) if known else VolvelleError(f"{type(error).__name__}: {error}")
        text.add_note(traceback.format_exc())
        message = ("error", text)
    pipe.send(message)
    pipe.close()
