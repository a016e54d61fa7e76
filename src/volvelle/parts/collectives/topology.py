"""Which ranks share a machine."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist


@dataclass(frozen=True)
class Topology:
    """The ranks of a group by node, each rank once: `Topology(((0, 1), (2, 3)))` is two machines of two ranks.

    Raises:
        ValueError: a node without ranks, or ranks that are not 0 .. p - 1, each once.
    """

    nodes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        ranks = sorted(rank for node in self.nodes for rank in node)
        if ranks != list(range(len(ranks))) or not all(self.nodes):
            raise ValueError(f"Topology: nodes must hold every rank 0 .. p - 1 once, got {self.nodes}")

    @staticmethod
    def of(names: Sequence[str]) -> Topology:
        """From the machine's name of each rank.

        >>> Topology.of(["a", "b", "a"]).nodes
        ((0, 2), (1,))
        """
        by_name: dict[str, list[int]] = {}
        for rank, name in enumerate(names):
            by_name.setdefault(name, []).append(rank)
        return Topology(tuple(tuple(ranks) for ranks in by_name.values()))

    @staticmethod
    def detect(group: dist.ProcessGroup | None = None) -> Topology:
        """Ask every rank for its machine: one small exchange, a collective that all ranks must call."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        mine = f"{socket.gethostname()} {boot.read_text().strip() if boot.is_file() else ''}"
        names: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(names, mine, group=group)
        return Topology.of(names)

    @property
    def size(self) -> int:
        """Number of ranks, p."""
        return sum(len(node) for node in self.nodes)

    @property
    def levels(self) -> int:
        """2 where ranks share machines and there are several machines, else 1."""
        return 2 if len(self.nodes) > 1 and len(self.nodes) < self.size else 1

    def place(self, rank: int) -> tuple[int, int]:
        """The node of a rank and its place inside it."""
        for n, node in enumerate(self.nodes):
            if rank in node:
                return n, node.index(rank)
        raise ValueError(f"Topology: no rank {rank} in {self.nodes}")
