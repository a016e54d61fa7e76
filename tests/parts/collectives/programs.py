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
    wire,
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
        lambda: all_reduce(x.to(torch.uint16)),
        lambda: all_reduce(x[:1].expand(3)),
        lambda: all_reduce(x.to("meta")),
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


def lose(rank: int, victim: int, how: str, when: str, algorithm: str, timeout: float) -> tuple[str, int, float]:
    """All reduce over and over; the victim kills or stops itself in the third round. The error of the others.

    `when` is before that round's first message, or in the middle: after messages of it have arrived and left.
    """
    began = time.monotonic()
    x = torch.ones(1 << 20)
    plain = wire.Wire.wait

    def end(*_) -> None:
        os.kill(os.getpid(), signal.SIGKILL if how == "dead" else signal.SIGSTOP)

    def wait(self, *transfers) -> None:
        plain(self, *transfers)
        waits.append(1)
        if len(waits) == 2:
            end()

    waits: list[int] = []
    try:
        for turn in range(1000):
            if turn == 2:
                began = time.monotonic()
                if rank == victim and when == "before":
                    end()
                elif rank == victim:
                    wire.Wire.wait = wait  # type: ignore[method-assign]
            with messages_of(1 << 18):  # 4 MB in 16 messages
                all_reduce(x, algorithm=algorithm, timeout=timeout)  # type: ignore[arg-type]
    except PeerLost as error:
        return str(error), error.rank, time.monotonic() - began
    return "nothing was raised", -1, 0.0


def disagree(rank: int, how: str, odd: int, timeout: float) -> tuple[str, str]:
    """One collective in which rank `odd` does something else. The error's type and text."""
    mine = rank == odd
    count = 12 if mine and how == "count" else 10
    dtype = torch.int32 if mine and how == "dtype" else torch.float32
    op = OPS["max" if mine and how == "op" else "sum"]
    algorithm: Any = "tree" if mine and how == "algorithm" else "ring"
    p = dist.get_world_size()
    try:
        if how == "sizes":
            targets = [torch.empty(3 + (mine and r == 0)) for r in range(p)]
            all_gather(targets, torch.ones(targets[rank].numel()), algorithm=algorithm, timeout=timeout)
        elif how == "call" and mine:
            reduce_scatter(torch.empty(10), [torch.ones(10)] * p, algorithm=algorithm, timeout=timeout)
        else:
            all_reduce(torch.ones(count, dtype=dtype), op, algorithm=algorithm, timeout=timeout)
    except RuntimeError as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


def layouts(rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """all_reduce of tensors whose memory is not what they show, beside the sum of the same values made plain."""
    base = torch.randn(4, 6, dtype=torch.complex64, generator=torch.Generator().manual_seed(rank))
    real = base.real.contiguous()
    wide = torch.zeros(4, 12)
    wide[:, 3:9] = real
    leaf = real.clone().requires_grad_()
    shapes = {
        "conjugate": base.clone().conj(),
        "negated": base.clone().conj().imag,
        "transposed": real.clone().t(),
        "a slice": wide[:, 3:9],
        "channels last": real.clone().view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "a leaf that learns": leaf,
        "a number": real.sum(),
        "empty with a shape": torch.empty(3, 0, 2),
    }
    found = {}
    for name, x in shapes.items():
        plain = x.detach().clone().resolve_conj().resolve_neg().contiguous()
        all_reduce(x, algorithm="halving-doubling")
        dist.all_reduce(plain)
        found[name] = (x.detach().clone().resolve_conj().resolve_neg().contiguous(), plain)
    assert bool((wide[:, :3] == 0).all()), "wrote beside the slice"
    return found


def uncommutative(rank: int, algorithm: str) -> list[bytes]:
    """Reductions whose two orders give other bits: signed zeros, NaNs with a payload, complex products, long sums."""
    p = dist.get_world_size()
    nodes = ((0,), tuple(range(1, p))) if algorithm == "two-level" else None
    zeros = torch.zeros(67) * (1 if rank % 2 else -1)
    nans = torch.full((67,), 0x7FC00000 + rank, dtype=torch.int32).view(torch.float32)
    inputs = [
        (zeros, "max"),
        (zeros.clone(), "min"),
        (nans, "sum"),
        (values(rank, 1001, torch.complex64), "product"),
        (values(rank, 1001, torch.bfloat16), "sum"),
    ]
    results = []
    for x, op in inputs:
        time.sleep(0.002 * ((rank * 7 + len(results) + os.getpid()) % 3))  # whoever is late must not matter
        all_reduce(x, OPS[op], algorithm=algorithm, topology=plan(nodes))  # type: ignore[arg-type]
        results.append(bits(x))
    return results
