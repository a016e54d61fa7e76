"""Several ranks over gloo on loopback, each a process that joins as torchrun's workers do."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from volvelle.train.launch import hush, joined
from volvelle.train.options import FitOptions

LIMIT = 120.0
"""Seconds after which the processes of one test are ended, whatever they do."""

hush()  # before the server that forks the ranks loads torch
CONTEXT = multiprocessing.get_context("forkserver")  # torch is imported once, and forked before any thread
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "volvelle.train.sharded", "tests.train.programs"])


class _Call(NamedTuple):
    program: Callable[..., Any]
    arguments: tuple
    keywords: dict[str, Any]


class Many:
    """`world` processes that run program(ranks, …) each; the store lives here, as torchrun's does in its agent.

    `outcomes[r]` is what rank r returned, or an error's class and text; None when the process died without a word.
    """

    def __init__(self, told: Path, world: int, options: FitOptions, program, *arguments: Any, **keywords: Any):
        self.told, self.world = told, world
        told.mkdir(parents=True, exist_ok=True)
        for left in told.glob("outcome-*.json"):
            left.unlink()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = [
            CONTEXT.Process(
                target=_work,
                args=(rank, world, self.store.port, told, options, _Call(program, arguments, keywords)),
                daemon=True,
            )
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def wait(self, limit: float = LIMIT) -> list[Any]:
        """The outcomes, once all processes have ended; what is left after `limit` seconds is killed."""
        until = time.monotonic() + limit
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        self.late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join(10)
        return self.outcomes

    @property
    def outcomes(self) -> list[Any]:
        """What every rank said so far."""
        found = []
        for rank in range(self.world):
            path = self.told / f"outcome-{rank}.json"
            found.append(json.loads(path.read_text()) if path.exists() else None)
        return found


def run(told: Path, world: int, options: FitOptions, program, *arguments: Any, **keywords: Any) -> list[Any]:
    """Run to the end; an error of any rank fails the test."""
    outcomes = Many(told, world, options, program, *arguments, **keywords).wait()
    for rank, outcome in enumerate(outcomes):
        assert outcome is not None, f"rank {rank} died"
        assert "error" not in outcome, f"rank {rank}: {outcome}"
    return outcomes


def _work(rank: int, world: int, port: int, folder: Path, options: FitOptions, call: _Call) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        GLOO_SOCKET_IFNAME="lo",
    )
    told = {}
    try:
        with joined(options, device="cpu") as ranks:
            try:
                told = {"value": call.program(ranks, *call.arguments, **call.keywords)}
            except Exception as error:
                # Before the group decides who tells the user: the test wants to hear all.
                told = {"error": type(error).__name__, "text": str(error), "trace": traceback.format_exc()}
                raise
    except (SystemExit, Exception) as error:  # noqa: BLE001 - the outcome has it
        told = told or {"error": type(error).__name__, "text": str(error), "trace": traceback.format_exc()}
    finally:
        path = folder / f"outcome-{rank}.json"
        path.with_suffix(".part").write_text(json.dumps(told))
        path.with_suffix(".part").rename(path)
