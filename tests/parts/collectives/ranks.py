"""A pool of ranks over gloo on loopback: programs are sent to every rank, and what each returns comes back."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 60.0
"""Seconds that one program may take."""


class Ranks:
    """`size` processes of one group. The store lives in the caller, as torchrun's does, so no rank's death loses it.

    With `store_in_rank_0` it lives there, as torch has it without torchrun.
    """

    def __init__(self, size: int, *, timeout: float = 30.0, store_in_rank_0: bool = False):
        self.store = None if store_in_rank_0 else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = None if self.store is None else self.store.port
        # What is heavy is imported once (DDP needs dynamo), and forked before any thread.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", __name__])
        self.pipes, self.processes, self.broken = [], [], False
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, port, rank, size, timeout), daemon=True)
            process.start()
            theirs.close()
            if port is None:
                port = ours.recv()
            self.pipes.append(ours)
            self.processes.append(process)

    def start(self, program: Callable[..., Any], *arguments: Any) -> None:
        """Send program(rank, *arguments) to every rank."""
        for pipe in self.pipes:
            pipe.send((program, arguments))

    def result(self, rank: int, limit: float = LIMIT) -> Any:
        """What one rank returned; its exception is raised here."""
        if not self.pipes[rank].poll(limit):
            self.close()
            raise TimeoutError(f"rank {rank} did not answer within {limit} s")
        value = self.pipes[rank].recv()
        if isinstance(value, _Failed):
            raise AssertionError(f"rank {rank}:\n{value.text}")
        return value

    def run(self, program: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run on every rank and collect, in rank order."""
        self.start(program, *arguments)
        try:
            return [self.result(rank) for rank in range(len(self.pipes))]
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """End every process."""
        self.broken = True
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)


class _Failed:
    def __init__(self, text: str):
        self.text = text


def _serve(pipe, port: int | None, rank: int, size: int, timeout: float) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=LIMIT)
    store = dist.TCPStore("127.0.0.1", port or 0, is_master=port is None, timeout=limit, wait_for_workers=False)
    if port is None:
        pipe.send(store.port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    while True:
        try:
            program, arguments = pipe.recv()
        except EOFError:
            return
        try:
            value = program(rank, *arguments)
        except Exception:  # noqa: BLE001 - sent to the caller, who raises it
            value = _Failed(traceback.format_exc())
        pipe.send(value)
