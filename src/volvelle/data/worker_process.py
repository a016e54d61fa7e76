"""What runs inside a worker process of the loader: read a batch, send it, until told to stop."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from volvelle.data.transport import Channel, Failure, told
from volvelle.errors import VolvelleError

_ORPHAN_SECONDS = 1.0


class Task(NamedTuple):
    """Read these samples as batch `number`; the generators are seeded with `key` and the first of them."""

    number: int
    key: str
    ids: Sequence[int]


Load = Callable[[Task, Callable[[int], None]], Any]
"""Reads the samples of a task, calling the second argument with the number of each before it is read."""


def work(connection: Connection, load: Load, current: Any, parent: int | None) -> None:
    """Serve tasks until the connection closes. `current.value` always holds the sample that is being read, or -1.

    `parent` is the process id to follow; None for whoever is the parent (a fork server).
    """
    # Ctrl-C reaches the whole process group: the parent decides. And the parent's own handlers are not ours.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_follow, args=(parent or os.getppid(),), name="volvelle-follow", daemon=True).start()
    if "torch" in sys.modules:
        # One thread a worker: they share the processor, and OpenMP's pool does not survive a fork.
        sys.modules["torch"].set_num_threads(1)
    channel = Channel(connection)
    with contextlib.suppress(EOFError, OSError):
        while True:
            task: Task = connection.recv()
            try:
                _seed(f"{task.key}/{task.ids[0]}")
                value, failed = load(task, lambda i: setattr(current, "value", i)), False
            except BaseException as error:  # noqa: BLE001 - whatever it is, the parent must hear of it
                value, failed = _failure(error), True
            current.value = -1
            _send(channel, task.number, value, failed)


def _send(channel: Channel, number: int, value: Any, failed: bool) -> None:
    try:
        channel.send(number, value, failed=failed)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - pickling runs the dataset's code and may raise anything
        message = f"a batch cannot be sent from a worker process: {told(error)}"
        tip = "let collate return tensors, arrays and plain Python values, or use workers=threads"
        channel.send(number, Failure(message, tip, traceback.format_exc(), whole=True), failed=True)


def _failure(error: BaseException) -> Failure:
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, VolvelleError):
        return Failure(str(error), error.tip, trace)
    return Failure(told(error), None, trace)


def _seed(key: str) -> None:
    """Seed the global generators: a forked worker would else repeat its siblings' numbers."""
    draw = random.Random(key)
    random.seed(draw.getrandbits(64))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(draw.getrandbits(32))
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(draw.getrandbits(63))


def _follow(parent: int) -> None:
    """End this process when its parent is gone, whatever it is doing.

    The end of the pipe would not tell: workers forked later hold copies of it.
    """
    while os.getppid() == parent:
        time.sleep(_ORPHAN_SECONDS)
    os._exit(1)
