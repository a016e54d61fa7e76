"""What the ranks of the tests run; each function is one rank's part. Inputs depend on the seed and the rank alone."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from volvelle.parts.collectives import (
    HookState,
    PeerLost,
    Topology,
    Traffic,
    all_gather,
    all_reduce,
    comm_hook,
    reduce_scatter,
    ring,
    transfer,
)

OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
    "xor": dist.ReduceOp.BXOR,
}


def values(rank: int, count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """This rank's vector."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype == torch.bool:
        return torch.rand(count, generator=generator) < 0.5
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(0, 5, (count,), generator=generator).to(dtype)
    if dtype.is_complex:
        return torch.randn(count, dtype=dtype, generator=generator)
    return torch.randn(count, dtype=torch.float64, generator=generator).to(dtype)


def bits(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def plan(nodes: tuple | None) -> Topology | None:
    return None if nodes is None else Topology(nodes)


@contextlib.contextmanager
def messages_of(size: int | None):
    """Inside, messages are cut at `size` bytes, so that small vectors travel in several segments too."""
    before = ring.SEGMENT, transfer.SEGMENT
    if size is not None:
        ring.SEGMENT = transfer.SEGMENT = size
    try:
        yield
    finally:
        ring.SEGMENT, transfer.SEGMENT = before


def reduce_all(rank: int, cases: list[dict]) -> list[tuple[bytes, int, int, int]]:
    """all_reduce for every case: the bits of the result, bytes sent and received, messages."""
    results = []
    for case in cases:
        x = values(rank, case["count"], case["dtype"])
        if case.get("strided"):
            x = torch.stack([x, x], dim=1)[:, 0]
        traffic = Traffic()
        with messages_of(case.get("segment")):
            y = all_reduce(
                x, OPS[case["op"]], algorithm=case["algorithm"], topology=plan(case.get("nodes")), traffic=traffic
            )
        assert y is x
        results.append((bits(x), traffic.sent, traffic.received, traffic.messages))
    return results


def peer_reduce(rank: int, cases: list[dict]) -> list[bytes]:
    """torch.distributed's own result for the same cases."""
    results = []
    for case in cases:
        x = values(rank, case["count"], case["dtype"])
        dist.all_reduce(x, OPS[case["op"]])
        results.append(bits(x))
    return results


def scatter_and_gather(rank: int, cases: list[dict]) -> list[tuple[bytes, bytes, int, int]]:
    """reduce_scatter and all_gather over blocks of given sizes: results and bytes sent by each."""
    results = []
    for case in cases:
        sizes, dtype = case["sizes"], case["dtype"]
        options: dict[str, Any] = {"algorithm": case["algorithm"], "topology": plan(case.get("nodes"))}
        blocks = list(values(rank, sum(sizes), dtype).split(sizes))
        scattered, gathered = Traffic(), Traffic()
        output = torch.empty(sizes[rank], dtype=dtype)
        with messages_of(case.get("segment")):
            reduce_scatter(output, blocks, OPS[case["op"]], traffic=scattered, **options)
            targets = [torch.empty(size, dtype=dtype) for size in sizes]
            all_gather(targets, values(rank, sizes[rank], dtype, seed=1), traffic=gathered, **options)
        results.append((bits(output), bits(torch.cat(targets)), scattered.sent, gathered.sent))
    return results


def complain(rank: int) -> list[str]:
    """The messages of calls that must be refused, the same on every rank and before anything is sent."""
    p = dist.get_world_size()
    x = torch.ones(3)
    calls = [
        lambda: all_reduce(x, algorithm="rnig"),  # type: ignore[arg-type]
        lambda: all_reduce(x, algorithm="two-level"),
        lambda: all_reduce(x, topology=Topology.of(["a"] * (p + 1))),
        lambda: all_reduce(x.to_sparse()),
        lambda: all_reduce(x.long(), dist.ReduceOp.AVG),
        lambda: all_reduce(x.to(torch.complex64), dist.ReduceOp.MAX),
        lambda: all_reduce(x, dist.ReduceOp.BXOR),
        lambda: all_gather([x] * (p + 1), x),
        lambda: all_gather([x] * p, x[:2]),
        lambda: reduce_scatter(x.double(), [x] * p),
    ]
    messages = []
    for call in calls:
        try:
            call()
        except (ValueError, TypeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
        else:
            messages.append("nothing was raised")
    return messages


def inside_group(rank: int, members: list[int]) -> list[float]:
    """all_reduce in a subgroup whose ranks are not the world's; the others stay out."""
    group = dist.new_group(members)
    x = torch.full((5,), float(rank + 1))
    if rank in members:
        all_reduce(x, group=group, algorithm="ring")
    return x.tolist()


def detect(rank: int) -> tuple:
    return Topology.detect().nodes


def train(rank: int, kind: str) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of a small network over p batches: one process with all of them, or DDP with a hook or without."""
    p = dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 37), nn.Tanh(), nn.Linear(37, 37), nn.Tanh(), nn.Linear(37, 3))
    inputs = torch.randn(4 * p, 13)
    targets = torch.randn(4 * p, 3)
    state = HookState(compress=torch.bfloat16 if kind == "bf16" else None, algorithm="ring")
    if kind != "one":
        wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.004)  # type: ignore[arg-type]
        if kind != "stock":
            wrapped.register_comm_hook(state, comm_hook)
        mine = slice(4 * rank, 4 * rank + 4)
        inputs, targets = inputs[mine], targets[mine]
        nn.functional.mse_loss(wrapped(inputs), targets).backward()
    else:
        nn.functional.mse_loss(model(inputs), targets).backward()
    return {name: q.grad.clone() for name, q in model.named_parameters()}, state.traffic.sent


def lose(rank: int, victim: int, how: str, algorithm: str, timeout: float) -> tuple[str, int, float]:
    """All reduce over and over; the victim kills or stops itself at the second round. The error of the others."""
    began = time.monotonic()
    x = torch.ones(1 << 16)
    try:
        for turn in range(1000):
            if rank == victim and turn == 2:
                os.kill(os.getpid(), signal.SIGKILL if how == "dead" else signal.SIGSTOP)
            if turn == 2:
                began = time.monotonic()
            all_reduce(x, algorithm=algorithm, timeout=timeout)
    except PeerLost as error:
        return str(error), error.rank, time.monotonic() - began
    return "nothing was raised", -1, 0.0
