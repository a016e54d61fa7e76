"""Two levels: inside each node first, then between nodes, each part of the vector by a rank of its own.

The hierarchical form of Rabenseifner's algorithm (Thakur, Rabenseifner and Gropp 2005, section 7, names it as what
clusters of shared-memory nodes need). L ranks a node, N nodes, m = the smallest node's ranks:
1. ring reduce-scatter inside the node into m parts; 2. reduce part l among the l-th ranks of all nodes; 3. ring
all-gather inside the node. Between nodes only V / m bytes a rank travel twice (times (N - 1)/N), against the flat
ring's 2 (p - 1)/p V over each node's border. Ranks beyond m own an empty part, so nodes may differ in size.

Time: 2 (L - 1) alpha_in + 2 (L - 1)/L V beta_in + T_between(N, V / m).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from volvelle.parts.collectives import ring
from volvelle.parts.collectives.blocks import Combine, even_bounds
from volvelle.parts.collectives.topology import Topology
from volvelle.parts.collectives.wire import Wire


class Algorithm(Protocol):
    """What every file of an algorithm offers, over a wire and a flat contiguous vector."""

    def all_reduce(self, wire: Wire, x: torch.Tensor, combine: Combine) -> None:
        """Reduce x over all ranks, in place."""
        ...

    def reduce_scatter(self, wire: Wire, x: torch.Tensor, bounds: Sequence[int], combine: Combine) -> None:
        """Reduce block r of x onto rank r; the rest of x is scratch."""
        ...

    def all_gather(self, wire: Wire, x: torch.Tensor, bounds: Sequence[int]) -> None:
        """Bring every rank's block of x to every rank."""
        ...


@dataclass(frozen=True)
class TwoLevel:
    """The algorithm for one topology; `between` is the algorithm among nodes."""

    topology: Topology
    between: Algorithm

    def all_reduce(self, wire: Wire, x: torch.Tensor, combine: Combine) -> None:
        """Reduce the flat vector x over all ranks, in place."""
        level = _Level(self.topology, wire)
        bounds = level.inside_bounds(even_bounds(x.numel(), level.columns))
        ring.reduce_scatter(level.inside, x, bounds, combine)
        if level.column is not None:
            self.between.all_reduce(level.column, x[bounds[level.place] : bounds[level.place + 1]], combine)
        ring.all_gather(level.inside, x, bounds)

    def reduce_scatter(self, wire: Wire, x: torch.Tensor, bounds: Sequence[int], combine: Combine) -> None:
        """Afterwards block r of x holds the reduction over all ranks; the other blocks hold partial results."""
        level = _Level(self.topology, wire)
        y, places = level.by_column(x, bounds)
        inside, between = level.cuts(places)
        ring.reduce_scatter(level.inside, y, inside, combine)
        if level.column is not None:
            part = y[inside[level.place] : inside[level.place + 1]]
            self.between.reduce_scatter(level.column, part, between, combine)
            for rank in level.dependants():
                wire.wait(wire.send(y[slice(*places[rank])], rank))
        else:
            wire.wait(wire.receive(y[slice(*places[wire.rank])], level.head()))
        x[bounds[wire.rank] : bounds[wire.rank + 1]] = y[slice(*places[wire.rank])]

    def all_gather(self, wire: Wire, x: torch.Tensor, bounds: Sequence[int]) -> None:
        """Block r of x is this rank's; afterwards every block is there."""
        level = _Level(self.topology, wire)
        y, places = level.by_column(x, bounds)
        inside, between = level.cuts(places)
        if level.column is not None:
            for rank in level.dependants():
                wire.wait(wire.receive(y[slice(*places[rank])], rank))
            part = y[inside[level.place] : inside[level.place + 1]]
            self.between.all_gather(level.column, part, between)
        else:
            wire.wait(wire.send(y[slice(*places[wire.rank])], level.head()))
        ring.all_gather(level.inside, y, inside)
        for rank, place in places.items():
            x[bounds[rank] : bounds[rank + 1]] = y[slice(*place)]


class _Level:
    """Where one rank stands: its node, its place in it, and its column (the ranks of the same place in all nodes)."""

    def __init__(self, topology: Topology, wire: Wire):
        self.nodes, self.rank = topology.nodes, wire.rank
        self.node, self.place = topology.place(wire.rank)
        self.columns = min(len(node) for node in self.nodes)
        self.inside = wire.among(self.nodes[self.node])
        self.column = wire.among([node[self.place] for node in self.nodes]) if self.place < self.columns else None

    def inside_bounds(self, bounds: Sequence[int]) -> list[int]:
        """Offsets of the node's blocks: a part for each of the first m places, nothing for the rest."""
        return [*bounds, *[bounds[-1]] * (len(self.nodes[self.node]) - self.columns)]

    def served(self, column: int, node: int) -> Iterator[int]:
        """The ranks of a node whose blocks travel in a column: every m-th, from the column's own."""
        yield from self.nodes[node][column :: self.columns]

    def dependants(self) -> list[int]:
        """The ranks of this node beyond the m-th whose blocks this rank handles."""
        return [rank for rank in self.served(self.place, self.node) if rank != self.rank]

    def head(self) -> int:
        """The rank that handles this one's block."""
        return self.nodes[self.node][self.place % self.columns]

    def by_column(self, x: torch.Tensor, bounds: Sequence[int]) -> tuple[torch.Tensor, dict[int, tuple[int, int]]]:
        """A copy of x with the blocks ordered by column, then node, and where each rank's block went."""
        order = [r for c in range(self.columns) for n in range(len(self.nodes)) for r in self.served(c, n)]
        places, at = {}, 0
        for rank in order:
            size = bounds[rank + 1] - bounds[rank]
            places[rank] = (at, at + size)
            at += size
        return torch.cat([x[bounds[rank] : bounds[rank + 1]] for rank in order]), places

    def cuts(self, places: dict[int, tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Offsets of the columns in the reordered vector, and of the nodes' shares inside this rank's column."""
        columns = [places[self.nodes[0][c]][0] for c in range(self.columns)]
        total = max(stop for _, stop in places.values())
        inside = self.inside_bounds([*columns, total])
        if self.column is None:
            return inside, []
        start = inside[self.place]
        shares = [places[node[self.place]][0] - start for node in self.nodes]
        return inside, [*shares, inside[self.place + 1] - start]
