"""Ring reduce-scatter, all-gather and all-reduce: bandwidth-optimal, in 2(p - 1) steps.

Patarasuk and Yuan 2009, Bandwidth optimal all-reduce algorithms for clusters of workstations, section 4.
Rank r sends only to r + 1 and receives only from r - 1. In step t it receives block (r - t - 2) mod p; while
t < p - 1 it adds its own part, afterwards the block is final and is kept. Every received segment is passed on in the
next step, so the whole all-reduce is one stream: receive, reduce or keep, pass on.

Sent a rank: 2 (p - 1) V / p bytes (p divides V); summed over ranks exactly 2 (p - 1) V.
Time: 2 (p - 1) alpha + 2 (p - 1)/p V beta + (p - 1)/p V gamma.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from volvelle.parts.collectives.blocks import Combine, even_bounds, segments
from volvelle.parts.collectives.wire import Wire

SEGMENT = 1 << 21
"""Bytes of one message: small enough that sending, receiving and adding overlap and the scratch stays in cache."""
WINDOW = 2
"""Receives posted ahead."""


def all_reduce(wire: Wire, x: torch.Tensor, combine: Combine) -> None:
    """Reduce the flat vector x over all ranks, in place."""
    _stream(wire, x, even_bounds(x.numel(), wire.size), combine, first=0, last=2 * wire.size - 2)


def reduce_scatter(wire: Wire, x: torch.Tensor, bounds: Sequence[int], combine: Combine) -> None:
    """Afterwards block r of x holds the reduction over all ranks; the other blocks hold partial results."""
    _stream(wire, x, bounds, combine, first=0, last=wire.size - 1)


def all_gather(wire: Wire, x: torch.Tensor, bounds: Sequence[int]) -> None:
    """Block r of x is this rank's; afterwards every block is there."""
    _stream(wire, x, bounds, None, first=wire.size - 1, last=2 * wire.size - 2)


def _stream(
    wire: Wire, x: torch.Tensor, bounds: Sequence[int], combine: Combine | None, *, first: int, last: int
) -> None:
    if first == last:
        return  # one rank, for example a node of one
    p, r = wire.size, wire.rank
    left, right = (r - 1) % p, (r + 1) % p
    most = max(SEGMENT // x.element_size(), 1)

    def pieces(t: int) -> list[torch.Tensor]:
        b = (r - t - 2) % p
        return [x[i:j] for i, j in segments(bounds[b], bounds[b + 1], most)]

    arriving = [(t, piece) for t in range(first, last) for piece in pieces(t)]
    widest = max((piece.numel() for t, piece in arriving if t < p - 1), default=0)
    scratch = [x.new_empty(widest) for _ in range(min(WINDOW, len(arriving)))] if widest else []
    sends = deque(wire.send(piece, right) for piece in pieces(first - 1))
    posted: deque = deque()
    ahead = 0
    for n, (t, piece) in enumerate(arriving):
        while ahead < min(n + WINDOW, len(arriving)):
            step, target = arriving[ahead]
            if step < p - 1:  # a partial sum must not overwrite this rank's own part
                target = scratch[ahead % WINDOW][: target.numel()]
            posted.append((target, wire.receive(target, left)))
            ahead += 1
        received, transfer = posted.popleft()
        wire.wait(transfer)
        if combine is not None and t < p - 1:
            combine(piece, received, piece)
        if t + 1 < last:
            sends.append(wire.send(piece, right))
    wire.wait(*sends)
