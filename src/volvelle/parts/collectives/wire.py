"""Point-to-point transfers of one process group, with every byte counted and a silent peer named.

Letters of this folder: p ranks, V bytes of the whole vector, r this rank, b a block of the vector, s a segment of a
block; alpha seconds a message, beta seconds a byte, gamma seconds to reduce a byte.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

TAG = 0x766F
GRACE = 3.0
"""Seconds in which survivors tell each other whom they wait for, once one of them has failed."""


class PeerLost(RuntimeError):
    """A transfer failed because another rank died or stopped; `rank` is its global rank, as far as can be told."""

    def __init__(self, message: str, rank: int):
        super().__init__(message)
        self.rank = rank


@dataclass
class Traffic:
    """What one rank sent and received: payload bytes and messages, in all and by peer (rank in the group).

    Pass one to a collective and it adds to it; use a fresh one, or `clear`, for a fresh count.

    >>> t = Traffic(); t.note_sent(1, 40); t.note_sent(2, 8); (t.sent, t.messages, t.to)
    (48, 2, {1: 40, 2: 8})
    """

    sent: int = 0
    received: int = 0
    messages: int = 0
    to: dict[int, int] = field(default_factory=dict)

    def note_sent(self, peer: int, count: int) -> None:
        """Count one message of `count` bytes to `peer`."""
        self.sent += count
        self.messages += 1
        self.to[peer] = self.to.get(peer, 0) + count

    def note_received(self, count: int) -> None:
        """Count one message of `count` bytes that was asked for."""
        self.received += count

    def clear(self) -> None:
        """Back to zero."""
        self.sent = self.received = self.messages = 0
        self.to.clear()


@dataclass
class Pending:
    """A transfer under way, and the rank at its other end."""

    works: Sequence[dist.Work]
    peer: int


class Wire:
    """One rank's view of a process group: send, receive, wait. Ranks are ranks within the group.

    `members` restricts the wire to some ranks of the group, in this order, and renumbers them from 0 (a node's ranks,
    or one rank a node), without a new process group. Blocks are contiguous tensors; an empty one is not sent, as both
    ends know its size. `timeout` in seconds bounds each wait; None leaves it to the group.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        call: str,
        traffic: Traffic | None = None,
        timeout: float | None = None,
        members: Sequence[int] | None = None,
    ):
        self.group, self.call, self.timeout = group, call, timeout
        self.traffic = Traffic() if traffic is None else traffic
        self.members = range(group.size()) if members is None else tuple(members)
        self.size = len(self.members)
        self.rank = self.members.index(group.rank())
        self._limit = None if timeout is None else timedelta(seconds=timeout)
        self._plain = dist.get_backend(group) in {"gloo", "mpi"}

    def among(self, members: Sequence[int]) -> Wire:
        """The same wire among some of its ranks only; this rank must be one of them."""
        chosen = [self.members[m] for m in members]
        return Wire(self.group, call=self.call, traffic=self.traffic, timeout=self.timeout, members=chosen)

    def send(self, block: torch.Tensor, peer: int) -> Pending | None:
        """Start sending; the block must not change until the transfer was waited for."""
        return self.start(send=block, to=peer)

    def receive(self, block: torch.Tensor, peer: int) -> Pending | None:
        """Start receiving into the block."""
        return self.start(receive=block, source=peer)

    def start(
        self,
        *,
        send: torch.Tensor | None = None,
        to: int = -1,
        receive: torch.Tensor | None = None,
        source: int = -1,
    ) -> Pending | None:
        """Start a send, a receive, or both at once; None when there is nothing to carry.

        Back ends that need matched pairs (NCCL) get both in one batch, so an exchange cannot deadlock.
        """
        sends = send is not None and send.numel() > 0
        receives = receive is not None and receive.numel() > 0
        if not (sends or receives):
            return None
        peer = self.members[source if receives else to]
        try:
            return Pending(self._post(send if sends else None, to, receive if receives else None, source), peer)
        except RuntimeError as error:
            raise self._lost(peer, error) from error

    def _post(
        self, send: torch.Tensor | None, to: int, receive: torch.Tensor | None, source: int
    ) -> Sequence[dist.Work]:
        operations, works = [], []
        if receive is not None:
            self.traffic.note_received(receive.numel() * receive.element_size())
            peer = self.members[source]
            if self._plain:
                works.append(self.group.recv([receive], peer, TAG))
            else:
                operations.append(dist.P2POp(dist.irecv, receive, group=self.group, group_peer=peer))
        if send is not None:
            peer = self.members[to]
            self.traffic.note_sent(peer, send.numel() * send.element_size())
            if self._plain:
                works.append(self.group.send([send], peer, TAG))
            else:
                operations.append(dist.P2POp(dist.isend, send, group=self.group, group_peer=peer))
        return works if self._plain else dist.batch_isend_irecv(operations)

    def wait(self, *transfers: Pending | None) -> None:
        """Block until the transfers are complete; a peer that dies or stays silent raises PeerLost with its rank."""
        for transfer in transfers:
            if transfer is None:
                continue
            try:
                for work in transfer.works:
                    if self._limit is None:
                        work.wait()
                    else:
                        work.wait(self._limit)
            except RuntimeError as error:
                raise self._lost(transfer.peer, error) from error

    def exchange(self, send: torch.Tensor, receive: torch.Tensor, peer: int) -> None:
        """Send to a peer and receive from it at the same time."""
        self.wait(self.start(send=send, to=peer, receive=receive, source=peer))

    def _lost(self, peer: int, error: RuntimeError) -> PeerLost:
        """Whose silence began it: the waited-for peer may itself have been waiting for somebody else."""
        peer, me = self._global(peer), dist.get_rank()
        culprit = _trace(self.group, me, peer)
        reason = str(error).strip().splitlines()[0]
        chain = "" if culprit == peer else f" (it was waiting for rank {culprit})"
        text = f"{self.call}: rank {culprit} is lost; rank {me} was waiting for rank {peer}{chain}: {reason}"
        return PeerLost(text, culprit)

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)


def _trace(group: dist.ProcessGroup, me: int, peer: int) -> int:
    """Say in the group's store whom this rank waits for, then follow the others' words to a rank that says nothing.

    A rank that died or was stopped is the one that leaves no word. Where the store itself cannot be reached (it often
    lives in rank 0), the peer is all that is known.
    """
    try:
        store = group.get_group_store()
        store.set(f"volvelle/lost/{me}", str(peer))
        seen, until = {me}, time.monotonic() + GRACE
        while peer not in seen:
            left = until - time.monotonic()
            if left <= 0:
                break
            seen.add(peer)
            try:
                store.wait([f"volvelle/lost/{peer}"], timedelta(seconds=left))
            except RuntimeError:
                break
            peer = int(store.get(f"volvelle/lost/{peer}"))
    except RuntimeError:
        return peer
    return peer
