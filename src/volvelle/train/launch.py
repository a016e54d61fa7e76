"""Starting many ranks, and being one of them.

`ranks=2` runs torchrun's machinery on this machine with the same command as its workers; a process that torchrun
started joins the group. So both are the same thing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volvelle.errors import UsageError, VolvelleError
from volvelle.runs import RunFolder
from volvelle.train.options import FitOptions

if TYPE_CHECKING:
    from volvelle.train.ranks import Ranks

INTERRUPTED = 130
"""Exit code of workers that were stopped, have saved, and can be resumed."""
TOLD = "VOLVELLE_TOLD"
"""Environment variable with the file that the worker makes which tells the user of an error."""
PATIENCE = timedelta(hours=6)
"""The longest that ranks wait in a collective: rank 0 may evaluate meanwhile. Lost ranks are the watch's business."""
SHUTDOWN = 600
"""Seconds that a worker has, after SIGTERM or Ctrl-C, to finish its step and save."""


def launched() -> bool:
    """Whether torchrun (or something that sets the same variables) started this process as one of its workers."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def hush() -> None:
    """Before torch is loaded: DDP would warn, once a rank, that it looks for unused parameters."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def restarts() -> int:
    """How often torchrun has started the workers again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def job() -> str | None:
    """What the workers of one torchrun have in common over restarts; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name is None else f"{socket.gethostname()}/{os.getppid()}/{name}"


def launch(ranks: int, words: Sequence[str]) -> int:
    """Run `python -m volvelle WORDS` as that many workers on this machine; the exit code of the worst.

    SIGTERM and Ctrl-C go on to the workers, which save and end.
    """
    import logging

    hush()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // ranks)))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"volvelle-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.5,
        shutdown_timeout=SHUTDOWN,
    )
    before = logging.root.manager.disable
    # Its own account of a failure is a page long; the workers have said in one line what happened.
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told"
        os.environ[TOLD] = str(told)
        try:
            elastic_launch(config, sys.executable)("-m", "volvelle", *words)
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            return _exit_code(codes, told.exists())
        except SignalException:
            return INTERRUPTED
        finally:
            logging.disable(before)
            del os.environ[TOLD]
    return 0


def _exit_code(codes: dict[int, int], told: bool) -> int:
    """One code for the workers that failed first; when no worker has told why, this process does."""
    said = [code for code in codes.values() if code > 0]
    if not said and not told:
        rank, code = next(iter(codes.items()))
        raise VolvelleError(f"rank {rank} was ended by {signal.Signals(-code).name}, and no rank could say more")
    return next((code for code in said if code != INTERRUPTED), INTERRUPTED if said else 1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def joined(options: FitOptions, *, device: str | None = None) -> Iterator[Ranks]:
    """The ranks of this process: the group that torchrun's variables describe, or this process alone.

    Inside, a lost rank is raised as `RankLost`. One rank raises what went wrong; the others exit without a word.
    `device` is the recipe's: ranks on CUDA devices take one each.
    """
    from volvelle.train.ranks import Ranks

    world = int(os.environ.get("WORLD_SIZE", "1")) if launched() else 1
    if options.ranks not in (1, world):
        raise UsageError(f"ranks={options.ranks}: torchrun has started {world} processes", tip="leave ranks= out")
    if world == 1:
        yield Ranks()
        return
    with _signals() as leaving, _group(options, world, device, leaving) as ranks:
        try:
            with ranks.guard(lambda: ""):
                yield ranks
        except (Exception, KeyboardInterrupt) as error:
            leaving.set()
            if not ranks.tells(error):
                raise SystemExit(getattr(error, "exit_code", 1)) from None
            if TOLD in os.environ:
                Path(os.environ[TOLD]).touch()
            raise


def options_of(options: Any, ranks: Ranks) -> Any:
    """The recipe with the number of ranks that it runs on, so that a resume starts as many."""
    return dataclasses.replace(options, ranks=ranks.world)


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """SIGTERM outside the loop ends like Ctrl-C; while an error is on its way out it is not heard.

    torchrun sends SIGTERM to the survivors as soon as one worker is gone, and they have something to say first.
    """
    leaving = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield leaving
        return

    def hear(number: int, frame: object) -> None:
        if not leaving.is_set():
            leaving.set()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, hear)
    try:
        yield leaving
    finally:
        # Not put back on the way out of an error: the process is about to say why and end.
        if not leaving.is_set():
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _group(options: FitOptions, world: int, device: str | None, leaving: threading.Event) -> Iterator[Any]:
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    from volvelle.train.watch import Watch

    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        count = torch.cuda.device_count()
        if local >= count:
            raise UsageError(f"ranks={world}: this machine has {count} CUDA devices", tip="fewer ranks, or device=cpu")
        torch.cuda.set_device(local)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store: Any = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=rank == 0 and not agent,
        timeout=timedelta(seconds=max(300.0, options.rank_timeout)),
        wait_for_workers=False,
    )
    # The store outlives a restart of the workers; their keys must not.
    attempt = f"volvelle/attempt-{restarts()}"
    own = PrefixStore(f"{attempt}/watch", store.clone())
    watch = Watch(own, rank, world, options.rank_timeout, hosted=not agent, leaving=leaving)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=PrefixStore(f"{attempt}/group", store),
        rank=rank,
        world_size=world,
        timeout=PATIENCE,
    )
    dist.barrier()
    watch.start()
    try:
        yield group(options, watch)
    except BaseException:
        # The group is left as it is: taking it down would wait for the rank that is gone.
        watch.leave_soon()
        raise
    watch.close()
    dist.destroy_process_group()


def group(options: FitOptions, watch: Any = None) -> Ranks:
    """The ranks of the default process group, as the options want them to work together."""
    from volvelle.train.distributed import Group

    if options.shard == "fsdp":
        from volvelle.train.sharded import ShardedGroup

        return ShardedGroup(watch=watch)
    return Group(watch=watch, hook=_hook(options))


def _hook(options: FitOptions) -> Any:
    if options.all_reduce == "torch" and not options.compress:
        return None
    import torch

    from volvelle.parts.collectives import HookState

    algorithm = "auto" if options.all_reduce == "torch" else options.all_reduce
    return HookState(algorithm=algorithm, compress=torch.bfloat16 if options.compress else None)


class Onlooker(RunFolder):
    """A run folder as the ranks other than 0 see it: they read it, and write nothing."""

    def update_manifest(self, **fields: Any) -> None:
        """Remember the fields here only."""
        self.manifest = {**self.manifest, **fields}

    def log(self, record: Any) -> None:
        """Leave it to rank 0."""
