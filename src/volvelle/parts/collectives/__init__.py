"""Collectives by point-to-point transfers: one file an algorithm, its paper, its bytes and its time."""

from volvelle.parts.collectives.collectives import AlgorithmName, all_gather, all_reduce, reduce_scatter
from volvelle.parts.collectives.hook import HookState, comm_hook
from volvelle.parts.collectives.selection import Choice, choose
from volvelle.parts.collectives.topology import Topology
from volvelle.parts.collectives.wire import PeerLost, RanksDisagree, Traffic

__all__ = [
    "AlgorithmName",
    "Choice",
    "HookState",
    "PeerLost",
    "RanksDisagree",
    "Topology",
    "Traffic",
    "all_gather",
    "all_reduce",
    "choose",
    "comm_hook",
    "reduce_scatter",
]
