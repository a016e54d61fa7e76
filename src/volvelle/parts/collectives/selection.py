"""Which algorithm for which size and topology, and why: a table of crossovers, measured, not assumed."""

from __future__ import annotations

from typing import NamedTuple

from volvelle.parts.collectives.topology import Topology

SHORT = 128 << 10
"""Bytes up to which rounds cost more than bytes: recursive doubling."""
LONG = 1 << 20
"""Bytes from which bytes cost more than rounds: the ring, whose transfers and additions overlap in one stream."""
MANY = 64
"""Ranks from which 2 (p - 1) messages outweigh the ring's overlap; halving-doubling needs 2 log2 p."""


class Choice(NamedTuple):
    """An algorithm's name and the reason for it."""

    algorithm: str
    why: str


def choose(size: int, ranks: int, topology: Topology | None = None) -> Choice:
    """The algorithm for a vector of `size` bytes on `ranks` ranks.

    The crossovers are those of benchmarks/collectives.py (gloo over loopback, 2 and 4 ranks on 2 cores): recursive
    doubling leads ring and halving-doubling up to SHORT, they lie within a fifth of each other at LONG, and ring and
    halving-doubling within a tenth above it. Trees do well there for short vectors, as all their messages together are
    the fewest; that is the shared machine's merit and is not used here.

    | bytes            | one level, p power of two | one level, other p | several ranks a machine, several machines |
    | up to SHORT      | recursive doubling        | recursive doubling | two-level                                 |
    | SHORT to LONG    | halving-doubling          | ring, or halving-doubling from MANY ranks | two-level          |
    | above LONG       | ring, or halving-doubling from MANY ranks (unless a rank's share exceeds LONG) | two-level |

    >>> choose(1024, 4).algorithm, choose(64 << 20, 4).algorithm
    ('recursive-doubling', 'ring')
    """
    if topology is not None and topology.levels == 2:
        nodes = len(topology.nodes)
        return Choice("two-level", f"{ranks} ranks on {nodes} machines: only a node's share crosses between them")
    if size <= SHORT:
        return Choice("recursive-doubling", f"{size} bytes are short: fewest rounds")
    power = ranks & (ranks - 1) == 0
    if ranks >= MANY and size // ranks <= LONG:
        return Choice("halving-doubling", f"{ranks} ranks: 2 log2 p rounds instead of the ring's 2 (p - 1)")
    if size <= LONG and power:
        return Choice("halving-doubling", f"{size} bytes, power of two: few rounds and the ring's bytes")
    return Choice("ring", f"{size} bytes: the fewest bytes a rank, transfers and additions overlap")
