"""What was allocated and freed, in order: the account from which a memory plan reads its peak.

Sizes are bytes of tensor storage. An entry is an allocation (+) or a release (-) of a block; the running sum is the
memory in use. Categories are settled at the end of a trace, because only then is it known that a storage became a
gradient or an optimiser state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

CATEGORIES: tuple[str, ...] = ("weights", "gradients", "optimiser", "activations", "temporaries", "buffers", "inputs")
"""In the order of the tables and of the layers in the timeline, from the bottom up."""


@dataclass(slots=True)
class Block:
    """One storage: its size and where it came from. `category` is empty until the ledger is settled.

    `phase` is setup, forward, backward, recompute (a checkpointed forward inside backward) or optimiser; `workspace`
    marks memory that a kernel takes and gives back inside one operation.
    """

    size: int
    op: str
    phase: str
    module: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    category: str = ""
    workspace: bool = False


@dataclass(slots=True)
class Entry:
    """One change: `sign` +1 or -1 for `block` (its index), during the operation `op` of `phase`."""

    block: int
    sign: int
    op: str
    phase: str


@dataclass(frozen=True)
class Point:
    """The memory at one moment of a timeline: ledger position, phase, bytes in the order of CATEGORIES.

    On one of many cards one number more, the bytes of communication, comes last.
    """

    position: int
    phase: str
    sizes: tuple[int, ...]


POINTS = 600  # of a timeline


def thinned(moments: Iterable[Point], start: int, stop: int, points: int = POINTS) -> Iterator[Point]:
    """At most `points` of the moments [start, stop): of each stretch the largest one stays, so the peak does."""
    stretch = max(1, -(-(stop - start) // points))
    best: Point | None = None
    for moment in moments:
        if best is not None and (moment.position - start) % stretch == 0:
            yield best
            best = None
        if best is None or sum(moment.sizes) > sum(best.sizes):
            best = moment
    if best is not None:
        yield best


@dataclass
class Ledger:
    """Blocks and entries of one trace. `marks` are (entry index, label) where a phase began."""

    blocks: list[Block] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)

    def allocate(self, block: Block) -> int:
        """Enter a new block; returns its index."""
        self.blocks.append(block)
        index = len(self.blocks) - 1
        self.entries.append(Entry(index, +1, block.op, block.phase))
        return index

    def release(self, index: int, op: str, phase: str) -> None:
        """Enter the end of a block."""
        self.entries.append(Entry(index, -1, op, phase))

    def mark(self, label: str) -> int:
        """Name the moment that comes next; returns its entry index."""
        self.marks.append((len(self.entries), label))
        return len(self.entries)

    def totals(self) -> Iterator[int]:
        """Bytes in use after each entry."""
        return accumulate(entry.sign * self.blocks[entry.block].size for entry in self.entries)

    def peak(self, start: int = 0, stop: int | None = None) -> tuple[int, int]:
        """(bytes, entry index) of the largest running sum among entries [start, stop); the first one on a tie.

        >>> ledger = Ledger()
        >>> first = ledger.allocate(Block(100, "empty", "setup", ""))
        >>> second = ledger.allocate(Block(50, "mul", "forward", ""))
        >>> ledger.release(first, "mul", "forward")
        >>> ledger.peak()
        (150, 1)
        """
        stop = len(self.entries) if stop is None else stop
        best, at, total = 0, max(0, start - 1), 0
        for index, total in enumerate(self.totals()):
            if index >= stop:
                break
            if index >= start - 1 and total > best:
                best, at = total, index
        return best, at

    def live(self, at: int) -> list[int]:
        """Indices of the blocks in use after entry `at`."""
        count: dict[int, int] = {}
        for entry in self.entries[: at + 1]:
            count[entry.block] = count.get(entry.block, 0) + entry.sign
        return [block for block, number in count.items() if number > 0]

    def composition(self, at: int) -> dict[str, int]:
        """Bytes of each category in use after entry `at`."""
        sums: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
        for index in self.live(at):
            block = self.blocks[index]
            sums[block.category or "temporaries"] += block.size
        return sums

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, str, dict[str, int]]]:
        """(entry index, phase, bytes of each category) after each entry of [start, stop); the dict is reused."""
        sums: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
        for index, entry in enumerate(self.entries[:stop]):
            block = self.blocks[entry.block]
            sums[block.category or "temporaries"] += entry.sign * block.size
            if index >= start:
                yield index, entry.phase, sums

    def settle(self, named: Mapping[str, Iterable[int]]) -> None:
        """Give every block its category: those in `named` first, the others by where they were made.

        What the forward pass made and backward still held is an activation.
        """
        for category, indices in named.items():
            for index in indices:
                self.blocks[index].category = self.blocks[index].category or category
        born: dict[int, str] = {}
        for entry in self.entries:
            block = self.blocks[entry.block]
            if entry.sign > 0:
                born[entry.block] = entry.phase
            elif not block.category and not block.workspace:
                kept = born[entry.block] == "forward" and entry.phase != "forward"
                block.category = "activations" if kept or born[entry.block] == "recompute" else "temporaries"
        for block in self.blocks:
            block.category = block.category or ("activations" if block.phase == "forward" else "temporaries")
