"""An all-reduce as it happened: every message between the ranks with its bytes, when it left and when it arrived.

The ranks are processes of this machine (collectives_ranks.py) and share a clock. The step of a message is the longest
chain of messages that had to arrive before it could leave: 0 for those that wait for nothing.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from volvelle.errors import UsageError
from volvelle.inspect.collectives_ranks import on_ranks
from volvelle.parts.collectives import Traffic, all_reduce
from volvelle.parts.collectives.model import Work, work_of

ALGORITHMS = ("ring", "halving-doubling", "recursive-doubling", "tree", "star")
"""The algorithms that take all ranks as equal."""


class Message(NamedTuple):
    """`size` bytes from one rank to another: its step, and when it left and arrived, in seconds from the beginning."""

    step: int
    source: int
    target: int
    size: int
    left: float
    arrived: float


@dataclass(frozen=True)
class CollectiveTrace:
    """One all-reduce of `size` bytes on `ranks` ranks: its messages in the order of their steps."""

    algorithm: str
    ranks: int
    size: int
    messages: tuple[Message, ...]
    right: bool
    """Whether every rank ended with the sum."""

    @property
    def steps(self) -> int:
        """Rounds of messages."""
        return 1 + max(message.step for message in self.messages)

    @property
    def sent(self) -> list[int]:
        """Bytes that each rank sent."""
        return [sum(m.size for m in self.messages if m.source == rank) for rank in range(self.ranks)]

    @property
    def work(self) -> Work:
        """What the algorithm's formula says of it."""
        return work_of(self.algorithm, self.ranks, self.size)


@dataclass
class Log(Traffic):
    """A count that also keeps what happened in order: (time, peer, bytes), bytes negative for what arrived."""

    events: list[tuple[float, int, int]] = field(default_factory=list)

    def note_sent(self, peer: int, count: int) -> None:
        """Count a message and keep when it left."""
        super().note_sent(peer, count)
        self.events.append((time.monotonic(), peer, count))

    def note_arrived(self, peer: int, count: int) -> None:
        """Keep when a message came."""
        super().note_arrived(peer, count)
        self.events.append((time.monotonic(), peer, -count))


def trace_all_reduce(algorithm: str, ranks: int, size: int) -> CollectiveTrace:
    """Reduce a vector of `size` bytes (fp32) over that many processes of this machine, and say what was sent.

    A first all-reduce, which is not kept, opens the connections. Raises UsageError for an unknown algorithm, fewer than
    two ranks or a size that is no multiple of 4 x ranks (blocks would differ), VolvelleError when a rank failed.
    """
    if algorithm not in ALGORITHMS:
        raise UsageError(f"algorithm: {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if ranks < 2 or size < 1 or size % (4 * ranks):
        raise UsageError(f"ranks: 2 or more, and bytes a multiple of 4 x ranks, got {ranks} ranks and {size} bytes")
    answers = on_ranks(ranks, _reduce, (algorithm, size // 4))
    return CollectiveTrace(
        algorithm, ranks, size, matched([events for events, _ in answers]), all(right for _, right in answers)
    )


def _reduce(rank: int, algorithm: Any, count: int) -> tuple[list[tuple[float, int, int]], bool]:
    x, log = torch.full((count,), float(rank + 1)), Log()
    all_reduce(x, algorithm=algorithm)
    p = dist.get_world_size()
    right = bool((x == p * (p + 1) / 2).all())
    dist.barrier()
    all_reduce(x, algorithm=algorithm, traffic=log)
    return log.events, right and bool((x == p * p * (p + 1) / 2).all())


def matched(logs: Sequence[Sequence[tuple[float, int, int]]]) -> tuple[Message, ...]:
    """The messages of all ranks, from what each saw in its order: what one sent first to another arrived there first.

    >>> matched([[(5.0, 1, 8), (9.0, 1, -8)], [(6.0, 0, -8), (7.0, 0, 8)]])[1]
    Message(step=1, source=1, target=0, size=8, left=2.0, arrived=4.0)
    """
    begun = min(when for log in logs for when, _, _ in log)
    arrivals = defaultdict[tuple[int, int], deque[float]](deque)
    for rank, log in enumerate(logs):
        for when, peer, count in log:
            if count < 0:
                arrivals[peer, rank].append(when)
    steps = _steps(logs)
    taken = defaultdict[tuple[int, int], int](int)
    found = []
    for rank, log in enumerate(logs):
        for when, peer, count in log:
            if count > 0:
                number = taken[rank, peer]
                taken[rank, peer] += 1
                arrived = arrivals[rank, peer][number]
                step = steps[rank, peer][number]
                found.append(Message(step, rank, peer, count, when - begun, arrived - begun))
    return tuple(sorted(found, key=lambda message: (message.step, message.source, message.left)))


def _steps(logs: Sequence[Sequence[tuple[float, int, int]]]) -> dict[tuple[int, int], list[int]]:
    """The step of each message by its ends."""
    steps = defaultdict[tuple[int, int], list[int]](list)
    newest = [-1] * len(logs)  # the last step that arrived at a rank
    for rank, peer, count, number in in_order(logs):
        if count > 0:
            steps[rank, peer].append(newest[rank] + 1)
        else:
            newest[rank] = max(newest[rank], steps[peer, rank][number])
    return steps


def in_order(logs: Sequence[Sequence[tuple[float, int, int]]]) -> Iterator[tuple[int, int, int, int]]:
    """The events of all ranks, what arrives behind what was sent: rank, peer, bytes and the message's number.

    `logs` has each rank's events in its order, (time, peer, bytes), bytes negative for what it waited for. Messages
    are numbered from one rank to another. Each log is gone through as far as what it waits for is known.

    >>> list(in_order([[(0, 1, -8)], [(0, 0, 8)]]))
    [(1, 0, 8, 0), (0, 1, -8, 0)]
    """
    places = [0] * len(logs)
    sent, arrived = defaultdict[tuple[int, int], int](int), defaultdict[tuple[int, int], int](int)
    moved = True
    while moved:
        moved = False
        for rank, log in enumerate(logs):
            while places[rank] < len(log):
                _, peer, count = log[places[rank]]
                way, numbers = ((rank, peer), sent) if count > 0 else ((peer, rank), arrived)
                if count <= 0 and arrived[way] >= sent[way]:
                    break
                yield rank, peer, count, numbers[way]
                numbers[way] += 1
                places[rank] += 1
                moved = True
