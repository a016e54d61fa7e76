"""Run a function on several ranks of this machine: processes of a fresh gloo group over loopback."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from volvelle.errors import VolvelleError

LIMIT = 600.0
"""Seconds in which every rank must have answered."""
SILENCE = 60.0
"""Seconds that one transfer may take."""


def on_ranks(
    ranks: int, program: Callable[..., Any], arguments: Sequence[Any] = (), *, threads: int = 1, limit: float = LIMIT
) -> list[Any]:
    """program(rank, *arguments) on every rank; what each returned, in rank order. No process is left behind.

    `program` is a function of a module's top level, its results can be pickled. A script that gets here needs the usual
    `__main__` guard.

    Raises:
        VolvelleError: a rank failed, died or did not answer within `limit` seconds; the others are ended first.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
    context = fresh_processes(program.__module__)
    pipes, processes = [], []
    try:
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            place = (theirs, store.port, rank, ranks, threads)
            processes.append(context.Process(target=_rank, args=(place, program, arguments), daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        return _answers(pipes, limit)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join(5)


def fresh_processes(module: str) -> Any:
    """How processes begin that hold nothing of this one but what `module` imports.

    A fork server imports torch once, and forks before there is any thread; only its first caller's module counts.
    """
    known = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
    if "forkserver" in known:
        context.set_forkserver_preload([module])
    return context


def _answers(pipes: Sequence[Any], limit: float) -> list[Any]:
    answers: list[Any] = [None] * len(pipes)
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    end = time.monotonic() + limit
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, end - time.monotonic()))
        if not ready:
            late = ", ".join(map(str, waiting.values()))
            raise VolvelleError(f"collectives: no answer from rank {late} within {limit:.0f} s")
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                fine, value = pipe.recv()  # pyright: ignore
            except EOFError:
                raise VolvelleError(f"collectives: rank {rank} ended without an answer") from None
            if not fine:
                error = VolvelleError(f"collectives: rank {rank}: {value[0]}")
                error.add_note(value[1])
                raise error
            answers[rank] = value
    return answers


def _rank(place: tuple[Any, int, int, int, int], program: Callable[..., Any], arguments: Sequence[Any]) -> None:
    pipe, port, rank, ranks, threads = place
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches everybody; the caller ends the ranks
    try:
        torch.set_num_threads(threads)
        store = dist.TCPStore("127.0.0.1", port, is_master=False)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=SILENCE))
        value = program(rank, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:  # noqa: BLE001 - sent to the caller, who raises it
        pipe.send((False, (f"{type(error).__name__}: {error}", traceback.format_exc())))
    else:
        pipe.send((True, value))
