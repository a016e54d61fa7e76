"""Moves that several algorithms share: swap and reduce in segments, and folding p ranks to a power of two."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from volvelle.parts.collectives.blocks import Combine, segments
from volvelle.parts.collectives.wire import Wire

SEGMENT = 1 << 20
"""Bytes of one message where a transfer is cut up, so that reducing one segment overlaps the next one's transfer."""
WINDOW = 2
"""Segments under way at once."""


def swap_reduce(wire: Wire, give: torch.Tensor | None, keep: torch.Tensor | None, peer: int, combine: Combine) -> None:
    """Send `give` to the peer while reducing what it sends into `keep`; either may be None.

    The two may be the same memory: a segment is reduced only after the same segment has left. The lower rank's operand
    comes first, so that a pair that computes the same sums gets the same bits.
    """
    lower = wire.rank < peer
    element = (give if give is not None else keep).element_size()  # type: ignore[union-attr]
    most = max(SEGMENT // element, 1)
    going = [] if give is None else [give[i:j] for i, j in segments(0, give.numel(), most)]
    coming = [] if keep is None else [keep[i:j] for i, j in segments(0, keep.numel(), most)]
    scratch = [c.new_empty(c.numel()) for c in coming[:WINDOW]]
    under_way: deque = deque()
    for n in range(max(len(going), len(coming))):
        if len(under_way) == WINDOW:
            _finish(wire, under_way, combine, lower)
        theirs = scratch[n % WINDOW][: coming[n].numel()] if n < len(coming) else None
        mine = going[n] if n < len(going) else None
        transfer = wire.start(send=mine, to=peer, receive=theirs, source=peer)
        under_way.append((transfer, coming[n] if n < len(coming) else None, theirs))
    while under_way:
        _finish(wire, under_way, combine, lower)


def _finish(wire: Wire, under_way: deque, combine: Combine, lower: bool) -> None:
    transfer, mine, theirs = under_way.popleft()
    wire.wait(transfer)
    if mine is not None and lower:
        combine(mine, theirs, mine)
    elif mine is not None:
        combine(theirs, mine, mine)


class Fold:
    """p ranks as the largest power of two, p' <= p, by pairing the first 2 (p - p') ranks: (0, 1), (2, 3), …

    Of a pair, the even rank takes part for both; the odd one waits. `core` is the wire among the p' that take part, or
    None for a rank that waits (Thakur, Rabenseifner and Gropp 2005, section 4.4). Core rank i stands for a run of
    neighbouring ranks, so the blocks it is responsible for lie next to each other.
    """

    def __init__(self, wire: Wire):
        self.wire = wire
        p = wire.size
        power = 1 << (p.bit_length() - 1)
        extra = p - power
        self.heads = [2 * i for i in range(extra)] + list(range(2 * extra, p))
        self.waits = wire.rank < 2 * extra and wire.rank % 2 == 1
        self.partner = wire.rank ^ 1 if wire.rank < 2 * extra else None
        self.core = None if self.waits else (wire.among(self.heads) if extra else wire)

    def bounds(self, bounds: Sequence[int]) -> list[int]:
        """The offsets of the core ranks' blocks, from those of all ranks."""
        return [bounds[head] for head in self.heads] + [bounds[-1]]

    def reduce_in(self, x: torch.Tensor, combine: Combine) -> None:
        """The waiting rank of each pair hands its vector to the other: V bytes."""
        if self.partner is not None:
            swap_reduce(self.wire, x if self.waits else None, None if self.waits else x, self.partner, combine)

    def hand(self, block: torch.Tensor, *, back: bool) -> None:
        """Copy a block from the waiting rank to its partner, or `back` again."""
        if self.partner is None:
            return
        if self.waits == back:
            self.wire.wait(self.wire.receive(block, self.partner))
        else:
            self.wire.wait(self.wire.send(block, self.partner))
