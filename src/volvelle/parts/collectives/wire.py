"""Point-to-point transfers of one process group, with every byte counted and a silent peer named.

Letters of this folder: p ranks, V bytes of the whole vector, r this rank, b a block of the vector, s a segment of a
block; alpha seconds a message, beta seconds a byte, gamma seconds to reduce a byte.
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

GRACE = 3.0
"""Seconds in which survivors tell each other whom they wait for, once one of them has failed."""


class PeerLost(RuntimeError):
    """A transfer failed because another rank died or was silent; `rank` is its global rank, as far as can be told."""

    def __init__(self, message: str, rank: int):
        super().__init__(message)
        self.rank = rank


class RanksDisagree(RuntimeError):
    """Ranks that are alive waited for each other: they called different collectives, or with other shapes or dtypes."""


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

    def note_arrived(self, peer: int, count: int) -> None:
        """A message of `count` bytes from `peer` is here: nothing is counted, an heir may keep a record."""

    def clear(self) -> None:
        """Back to zero."""
        self.sent = self.received = self.messages = 0
        self.to.clear()


@dataclass
class Pending:
    """A transfer under way, the rank at its other end, and the bytes that come in."""

    works: Sequence[dist.Work]
    peer: int
    coming: int = 0


class Wire:
    """One rank's view of a process group: send, receive, wait. Ranks are ranks within the group.

    `members` restricts the wire to some ranks of the group, in this order, and renumbers them from 0 (a node's ranks,
    or one rank a node), without a new process group. Blocks are contiguous tensors; an empty one is not sent, as both
    ends know its size. `timeout` in seconds bounds each wait; None leaves it to the group.

    `work` says what this rank is doing. Messages carry its checksum as their tag (gloo and MPI; NCCL has no tags), so
    ranks that do not mean the same never take each other's bytes: they wait, and the time-out says who differs.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        call: str,
        work: str = "",
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
        self.plain = dist.get_backend(group) in {"gloo", "mpi"}
        self.means(work)

    def means(self, work: str) -> None:
        """Say what this rank is about to do: everything that all ranks must agree on."""
        self.work, self.tag = work, zlib.crc32(work.encode()) & 0x7FFFFFFF

    def among(self, members: Sequence[int]) -> Wire:
        """The same wire among some of its ranks only; this rank must be one of them."""
        chosen = [self.members[m] for m in members]
        return Wire(
            self.group, call=self.call, work=self.work, traffic=self.traffic, timeout=self.timeout, members=chosen
        )

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
            works = self._post(send if sends else None, to, receive if receives else None, source)
        except RuntimeError as error:
            raise self._lost(peer, error) from error
        return Pending(works, peer, 0 if receive is None else receive.numel() * receive.element_size())

    def _post(
        self, send: torch.Tensor | None, to: int, receive: torch.Tensor | None, source: int
    ) -> Sequence[dist.Work]:
        operations, works = [], []
        if receive is not None:
            self.traffic.note_received(receive.numel() * receive.element_size())
            peer = self.members[source]
            if self.plain:
                works.append(self.group.recv([receive], peer, self.tag))
            else:
                operations.append(dist.P2POp(dist.irecv, receive, group=self.group, group_peer=peer))
        if send is not None:
            peer = self.members[to]
            self.traffic.note_sent(peer, send.numel() * send.element_size())
            if self.plain:
                works.append(self.group.send([send], peer, self.tag))
            else:
                operations.append(dist.P2POp(dist.isend, send, group=self.group, group_peer=peer))
        return works if self.plain else dist.batch_isend_irecv(operations)

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
            if transfer.coming:
                self.traffic.note_arrived(transfer.peer, transfer.coming)

    def exchange(self, send: torch.Tensor, receive: torch.Tensor, peer: int) -> None:
        """Send to a peer and receive from it at the same time."""
        self.wait(self.start(send=send, to=peer, receive=receive, source=peer))

    def _lost(self, peer: int, error: RuntimeError) -> RuntimeError:
        """Whose silence began it: the waited-for peer may itself have been waiting for somebody else."""
        me, peer = dist.get_rank(), dist.get_global_rank(self.group, peer)
        reason = str(error).strip().splitlines()[0]
        chain, works, answered = _trace(self.group, me, peer, self.work)
        culprit = chain[-1]
        if culprit in chain[:-1]:  # a circle: all of them are alive
            other = next((rank for rank in chain if works[rank] != self.work), None)
            if other is None:
                text = f"rank {peer} was silent; ranks {_arrows(chain)} wait for each other"
                return PeerLost(f"{self.call}: {text}: {reason}", peer)
            text = f"the ranks do not agree: rank {me} has {self.work}, rank {other} has {works[other]}"
            return RanksDisagree(f"{self.call}: {text}")
        if not answered and me != 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            culprit = 0  # torch keeps the store there, unless torchrun does
        more = "" if culprit == peer else f" (it was waiting for rank {culprit})"
        if not answered:
            more = "" if culprit == peer else " (the store does not answer, and rank 0 holds it unless you do)"
        text = f"{self.call}: rank {culprit} is lost; rank {me} was waiting for rank {peer}{more}: {reason}"
        return PeerLost(text, culprit)


def _arrows(chain: Sequence[int]) -> str:
    return " -> ".join(map(str, chain))


def _trace(group: dist.ProcessGroup, me: int, peer: int, work: str) -> tuple[list[int], dict[int, str], bool]:
    """Say in the group's store whom this rank waits for and what it does, then follow the words of the others.

    Returns the ranks from this one to one that says nothing, or to one that came before; what each said it was doing;
    and whether the store answered. A rank that died or was stopped is the one that leaves no word.
    """
    chain, works = [me, peer], {me: work}
    answered: list[bool] = []

    def follow() -> None:
        try:
            store = group.get_group_store()
            store.set(f"volvelle/lost/{me}", f"{peer} {work}")
            until = time.monotonic() + GRACE
            while chain[-1] not in chain[:-1]:
                key = f"volvelle/lost/{chain[-1]}"
                try:
                    store.wait([key], timedelta(seconds=max(until - time.monotonic(), 0.001)))
                except RuntimeError:
                    # Nobody said anything, or nobody listens: the own word tells the two apart.
                    answered.append(store.check([f"volvelle/lost/{me}"]))
                    return
                waits_for, _, theirs = store.get(key).decode().partition(" ")
                works[chain[-1]] = theirs
                chain.append(int(waits_for))
            answered.append(True)
        except RuntimeError:
            return

    # In a thread of its own: a store whose process was stopped holds on to whoever asks it.
    asking = threading.Thread(target=follow, name="volvelle-trace", daemon=True)
    asking.start()
    asking.join(GRACE + 1.0)
    return list(chain), works, bool(answered and answered[0])
