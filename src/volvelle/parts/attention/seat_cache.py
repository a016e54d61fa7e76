"""A key/value cache for texts that come and go: every row counts its own slots, and its tokens lie without holes.

`KVCache` writes all rows at one place, which is fastest for texts that begin together. Here each row ("seat") has a
cursor of its own, so a text that is over leaves at once, the next one takes its seat (`adopt`), and a token lies in the
slot of its position whatever the other rows do. The contract is the one of cache.py: begin -> append -> commit.

Shapes: b seats, h_kv key/value heads, n new tokens, m slots in reach, d features a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from volvelle.parts.attention.cache import KVCache, Slots, Step, check_step, checked_path


class SeatSnapshot(NamedTuple):
    """A state of the cache to come back to: how many tokens each row had, and when that was."""

    lengths: Tensor
    serial: int


class SeatCache(Slots):
    """Keys and values of the tokens so far, for all layers; rows have different lengths.

    >>> cache = SeatCache.allocate(layers=1, batch=2, kv_heads=2, context=8, head_width=4)
    >>> for kept in ([[0, 1], [0, -1]], [[0], [0]]):
    ...     step = cache.begin(2)
    ...     k_all, v_all = cache.append(0, torch.ones(2, 2, 2, 4), torch.ones(2, 2, 2, 4))
    ...     cache.commit(torch.tensor(kept))
    >>> step.positions.tolist(), cache.lengths.tolist(), tuple(k_all.shape)
    ([[2, 3], [1, 2]], [3, 2], (2, 2, 4, 4))
    >>> cache.forget(torch.tensor([0]))
    >>> cache.lengths.tolist()
    [0, 2]
    """

    beside = 1
    """The last slot takes what nobody reads."""

    def __init__(self, storage: Tensor) -> None:
        """Use storage of shape (layers, 2, b, h_kv, context + 1, d); `allocate` makes one."""
        super().__init__(storage)
        self._rows = torch.arange(self.batch, device=storage.device)[:, None]
        self._lengths = torch.zeros(self.batch, dtype=torch.long, device=storage.device)
        self._at = self._slots.new_zeros(self.batch, 0)  # the open step's slots (b, n)
        self._gained: Tensor | int = 0  # and how many of them each row keeps when all are kept
        self._end = self._even = 0  # the slots in reach; the one place at which all rows stand, -1: they differ
        self.pending = 0
        """The tokens of the open step."""
        self.in_turn = True
        """Whether the open step's tokens lie in the slots behind each row's last, none left out."""
        self._serial, self._rewinds = 0, list[tuple[int, Tensor]]()

    @property
    def length(self) -> int:
        """The tokens of the longest row."""
        return int(self._lengths.max())

    @property
    def lengths(self) -> Tensor:
        """The number of tokens in each row, (b,)."""
        return self._lengths.clone()

    @property
    def starts(self) -> Tensor:
        """Where the open step begins in each row, (b,) int64, contiguous: for kernels, to be read only."""
        return self._lengths

    def begin(self, n: int, *, padding: Tensor | None = None, tree: Tensor | None = None) -> Step:
        """Open a step of n new tokens; returns their positions and what they may attend to.

        padding is (b, n) bool, True = a real token; the others leave no slot. tree is (n, n) or (b, n, n) bool, True =
        may attend (a node's ancestors and the node itself); without it a token sees those before it. A token's
        position is the number of tokens of its row before it, in a tree along its path.
        Raises ValueError when the tokens do not fit into the context, or on shapes that do not fit.
        """
        check_step("SeatCache", self.batch, n, padding, tree)
        if padding is not None and tree is not None:
            raise ValueError("SeatCache: a step is padded or a tree, not both")
        if padding is not None and bool(padding.all()):
            padding = None
        gained = n if padding is None else padding.sum(1)
        ends = (self._lengths + gained).tolist()
        if max(ends) > self.context:
            row = max(range(len(ends)), key=lambda i: ends[i])
            raise ValueError(
                f"SeatCache: {ends[row] - int(self._lengths[row])} tokens after {int(self._lengths[row])} do not fit "
                f"into a context of {self.context} (row {row})"
            )
        own = torch.arange(n, device=self._slots.device)
        if padding is not None:
            own = padding.cumsum(1) - 1
        places = self._lengths[:, None] + own
        self._at = places if padding is None else torch.where(padding, places, self.context)
        self._gained, self.pending, self.in_turn = gained, n, padding is None
        self._end = max(ends)
        first = ends[0] - n
        self._even = first if padding is None and all(end == ends[0] for end in ends) else -1
        return Step(self._positions(places, tree), *self._mask(n, tree))

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (b, h_kv, n, d) of the open step; returns views (b, h_kv, m, d) of both."""
        if k.shape[2] != self.pending:
            raise ValueError(f"SeatCache: the open step has {self.pending} tokens, got k of shape {tuple(k.shape)}")
        if k.requires_grad or v.requires_grad:
            raise ValueError("SeatCache: keys and values that require gradients cannot be cached; use torch.no_grad()")
        for slots, new in zip(self._storage[layer], (k, v), strict=True):
            self._write(slots, new)
        keys, values = self._storage[layer].narrow(3, 0, self.reach or self._end).unbind()
        return keys, values

    def key_positions(self, positions: Tensor) -> Tensor:
        """Return the positions of all keys of the open step, (b, m): a slot's number, but for the step's own tokens.

        `positions` are those of the step's own tokens, (n,) or (b, n).
        """
        reach = self.reach or self._end
        found = self._slots.expand(self.batch, -1).clone()
        found.scatter_(1, self._at, positions.expand(self.batch, -1).to(found.dtype))
        return found[:, :reach]

    def commit(self, path: Tensor | None = None) -> None:
        """Keep the tokens of the open step: all, or those at `path`, and close it.

        path is (b, m) int64: offsets into the step in the order in which the tokens follow each other, -1 = none; rows
        may keep different numbers. In a padded step all real tokens stay, or a path through them.
        """
        n, self.pending = self.pending, 0
        if path is None:
            self._lengths += self._gained
            return
        path = checked_path("SeatCache", self.batch, n, path.to(self._slots.device))
        taken = path >= 0
        target = self._lengths[:, None] + (taken.cumsum(1) - 1)
        source = self._at.gather(1, path.clamp(min=0))
        if bool((taken & (source == self.context)).any()):
            raise ValueError("SeatCache: the path holds a token that is padding")
        if bool((taken & (source != target)).any()):
            target = torch.where(taken, target, self.context)
            index = source[None, :, None, :, None].expand(2, -1, self.kv_heads, -1, self.head_width)
            for both in self._storage.unbind():  # one layer's at a time: little memory beside the cache
                kept = both.gather(3, index)
                for slots, moved in zip(both, kept, strict=True):
                    self._put(slots, target, moved)
        self._lengths += taken.sum(1)

    def trim(self, n: int) -> None:
        """Shorten the open step, one without padding, to its first n tokens: `commit` then means those."""
        if not self.in_turn or not 1 <= n <= self.pending:
            raise ValueError(f"SeatCache: the open step has {self.pending} tokens, it cannot be cut to {n}")
        self._at, self._gained, self.pending = self._at[:, :n], n, n

    def snapshot(self) -> SeatSnapshot:
        """Return the committed state, to `restore` later."""
        self._serial += 1
        return SeatSnapshot(self._lengths.clone(), self._serial)

    def restore(self, snapshot: SeatSnapshot) -> None:
        """Go back to an earlier state; what came after it is forgotten.

        Raises ValueError when a row has since been emptied, moved, or rewound to before the snapshot.
        """
        for serial, lengths in self._rewinds:
            if snapshot.serial <= serial and bool((lengths < snapshot.lengths).any()):
                raise ValueError("SeatCache: the snapshot was lost when rows were emptied, moved or rewound")
        self._rewinds = [(s, known) for s, known in self._rewinds if not bool((known >= snapshot.lengths).all())]
        self._rewinds.append((self._serial, snapshot.lengths.clone()))
        self._lengths, self.pending = snapshot.lengths.clone(), 0

    def reset(self) -> None:
        """Forget everything; the storage stays."""
        self._lengths.zero_()
        self._lost()

    def forget(self, rows: Tensor) -> None:
        """Empty these seats, int64; an open step is forgotten, and so are snapshots."""
        self._lengths[rows] = 0
        self._lost()

    def compact(self) -> None:
        """Nothing: rows have no holes."""

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from the row that was `rows[i]`, (b') int64: rows may repeat, be left out, change in number.

        An open step is forgotten, and so are snapshots.
        """
        if not torch.equal(rows, torch.arange(self.batch, device=rows.device)):
            self._storage, self._lengths = self._storage.index_select(2, rows), self._lengths[rows]
            self.batch, self._rows = len(rows), torch.arange(len(rows), device=rows.device)[:, None]
        self._lost()

    def adopt(self, row: int, text: KVCache) -> None:
        """Let the text of a cache of one row go on in this seat; snapshots are forgotten.

        Raises ValueError where it has more rows, holes, other sizes, or more tokens than there is room for.
        """
        length = text.length
        if text.batch != 1 or int(text.lengths) != length:
            raise ValueError(f"SeatCache: one text without holes is wanted, got {text.batch} rows of {length} slots")
        if length > self.context:
            raise ValueError(f"SeatCache: a text of {length} tokens does not fit into a context of {self.context}")
        theirs = text.storage[:, :, 0, :, :length]
        ours = self._storage[:, :, row, :, :length]
        if theirs.shape != ours.shape:
            raise ValueError(
                f"SeatCache: the text's keys are {tuple(theirs.shape)}, this cache's {tuple(ours.shape)} "
                "(layers, 2, h_kv, tokens, d)"
            )
        ours.copy_(theirs)
        self._lengths[row] = length
        self._lost()

    def _lost(self) -> None:
        self.pending = 0
        self._rewinds = [(self._serial, torch.full_like(self._lengths, -1))]

    def _write(self, slots: Tensor, new: Tensor) -> None:
        if self._even >= 0:
            slots.narrow(2, self._even, self.pending).copy_(new)
        else:
            self._put(slots, self._at, new)

    def _put(self, slots: Tensor, at: Tensor, new: Tensor) -> None:
        """Write new (b, h_kv, n, d) into slots (b, h_kv, context + 1, d) at (b, n)."""
        slots.transpose(1, 2)[self._rows, at] = new.transpose(1, 2).to(slots.dtype)

    def _positions(self, places: Tensor, tree: Tensor | None) -> Tensor:
        if tree is not None:
            depth = tree.sum(-1) - 1  # (n,) or (b, n)
            return self._lengths[:, None] + (depth if depth.dim() == 2 else depth[None])
        return places.clamp(min=0)

    def _mask(self, n: int, tree: Tensor | None) -> tuple[Tensor | None, bool]:
        last = self.reach or self._end
        if tree is None and self._even >= 0 and last == self._end:
            if n == 1:
                return None, False
            if self._even == 0:
                return None, True
        slots = self._slots[:last]
        if tree is None:
            return (slots <= self._at[:, :, None])[:, None], False
        offset = slots - self._lengths[:, None]  # (b, last): a slot's place in the step
        inside = (offset >= 0) & (offset < n)
        tree = tree.expand(self.batch, n, n)
        index = offset.clamp(0, n - 1)[:, None].expand(-1, n, -1)
        seen = (offset < 0)[:, None] | (inside[:, None] & tree.gather(2, index))
        return seen[:, None], False
