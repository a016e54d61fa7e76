"""The key/value cache: fixed storage, written in place, in which any part of a step can be kept or forgotten.

A step is begin -> append in every layer -> commit:
    step = cache.begin(n)                       # positions, mask and causal for all layers, made once
    k_all, v_all = cache.append(layer, k, v)    # writes n slots, returns views of all slots so far
    cache.commit()                              # keep the n slots; or commit(path): keep an accepted path of them
A step that is not committed is overwritten by the next one.

Rows of a batch may differ: a slot that a row does not use (left padding, a rejected token) is a hole in that row, and
positions count the slots that are not.

Shapes: b batch, h_kv key/value heads, n new tokens, d features a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor


class Step(NamedTuple):
    """What the layers need to know about one step; pass `mask` and `causal` on to `attention`.

    positions is (1, n) or (b, n), int64; mask is bool, broadcastable to (b, 1, n, slots so far), or None where nothing
    is hidden but what `causal` says.
    """

    positions: Tensor
    mask: Tensor | None
    causal: bool


class Snapshot(NamedTuple):
    """A state of the cache to come back to. It holds no keys: slots that were kept are not written again."""

    cursor: int
    has_holes: bool
    serial: int


class Cache(Protocol):
    """What a decoding loop knows of a model's memory of the tokens so far; which kind it is, only the layers know."""

    @property
    def length(self) -> int:
        """The number of slots in use, the same for all rows (holes included)."""
        ...

    @property
    def lengths(self) -> Tensor:
        """The number of tokens in each row, (b,)."""
        ...

    def begin(self, n: int, *, padding: Tensor | None = None, tree: Tensor | None = None) -> Step:
        """Open a step of n new tokens: padding (b, n), True = real; tree (n, n) or (b, n, n), True = may attend."""
        ...

    def commit(self, path: Tensor | None = None) -> None:
        """Keep the tokens of the open step: all, or those at `path` (b, m), offsets into the step, -1 = none."""
        ...

    def snapshot(self) -> Any:
        """Return the committed state, to `restore` later."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Go back to an earlier state; what came after it is forgotten."""
        ...

    def reset(self) -> None:
        """Forget everything."""
        ...

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from the row that was `rows[i]`, (b') int64; an open step is forgotten."""
        ...

    def forget(self, rows: Tensor) -> None:
        """Forget all tokens of these rows, int64, which begin anew; an open step is forgotten, and so are snapshots."""
        ...

    def compact(self) -> None:
        """Use no more slots than the longest row has tokens; an open step is forgotten, and so are snapshots."""
        ...


def check_step(cache: str, b: int, n: int, padding: Tensor | None, tree: Tensor | None) -> None:
    """Raise ValueError, in the name of `cache`, where padding or tree do not fit a step of n tokens in b rows."""
    if n < 1:
        raise ValueError(f"{cache}: a step has at least one token, got {n}")
    if padding is not None and tuple(padding.shape) != (b, n):
        raise ValueError(f"{cache}: padding must be (b, n) = ({b}, {n}), got {tuple(padding.shape)}")
    shapes = {(n, n), (1, n, n), (b, n, n)}
    if tree is not None and (tree.dtype != torch.bool or tuple(tree.shape) not in shapes):
        raise ValueError(f"{cache}: tree must be bool (n, n) or (b, n, n), got {tree.dtype} {tuple(tree.shape)}")


def checked_path(cache: str, b: int, n: int, path: Tensor) -> Tensor:
    """Return the path (b, m) into a step of n tokens, cut behind its last column in use.

    Raises ValueError, in the name of `cache`, where it does not fit.
    """
    if path.dim() != 2 or path.shape[0] != b or path.shape[1] > n:
        raise ValueError(f"{cache}: path must be (b, m <= {n}) with b = {b}, got {tuple(path.shape)}")
    if path.numel() and not bool(((path >= -1) & (path < n)).all()):
        raise ValueError(f"{cache}: path must hold offsets from -1 to {n - 1}, got {path.tolist()}")
    columns = (path >= 0).any(0).nonzero()
    return path[:, : int(columns[-1]) + 1 if columns.numel() else 0]


class Slots:
    """Storage for the keys and values of all layers, allocated once; heirs say which slot holds which token."""

    beside = 0
    """Slots of a row that hold no token of the context."""

    def __init__(self, storage: Tensor) -> None:
        """Use storage of shape (layers, 2, b, h_kv, context + beside, d); `allocate` makes one."""
        self._storage = storage
        self.layers, _, self.batch, self.kv_heads, slots, self.head_width = storage.shape
        self.context = slots - self.beside
        self._slots = torch.arange(slots, device=storage.device)
        self.reach: int | None = None
        """The slots that every step answers with, masked where nothing is yet, so that all steps have one shape; None:
        those so far."""

    @classmethod
    def allocate(
        cls,
        layers: int,
        batch: int,
        kv_heads: int,
        context: int,
        head_width: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Allocate room for `context` tokens a row, once: 2 * layers * b * h_kv * (context + beside) * d numbers."""
        shape = (layers, 2, batch, kv_heads, context + cls.beside, head_width)
        return cls(torch.zeros(shape, dtype=dtype, device=device))

    @property
    def storage(self) -> Tensor:
        """All slots, (layers, 2, b, h_kv, context + beside, d), for kernels that write an open step's themselves."""
        return self._storage


class KVCache(Slots):
    """Keys and values of the tokens so far, for all layers.

    >>> cache = KVCache.allocate(layers=1, batch=1, kv_heads=2, context=8, head_width=4)
    >>> step = cache.begin(3)
    >>> step.positions, step.mask, step.causal
    (tensor([[0, 1, 2]]), None, True)
    >>> k_all, v_all = cache.append(0, torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    >>> cache.commit(torch.tensor([[0, 2]]))  # the second token was rejected
    >>> cache.length, tuple(k_all.shape)
    (2, (1, 2, 3, 4))
    """

    def __init__(self, storage: Tensor) -> None:
        """Use storage of shape (layers, 2, b, h_kv, context, d); `allocate` makes one."""
        super().__init__(storage)
        self._new: tuple[Tensor, ...] = ()  # of the open step: keys and values of each layer, its new slots
        self._all: tuple[Tensor, ...] = ()  # and all slots up to its end
        # False marks a hole of that row; slots that are not written yet count as True
        self._keep = torch.ones(self.batch, self.context, dtype=torch.bool, device=storage.device)
        self._has_holes = False
        self._cursor = self._pending = 0
        self._serial = 0
        self._rewinds: list[tuple[int, int]] = []  # (serial, cursor): older snapshots beyond the cursor are lost

    @property
    def length(self) -> int:
        """The number of slots in use, the same for all rows (holes included)."""
        return self._cursor

    @property
    def lengths(self) -> Tensor:
        """The number of tokens in each row, (b,)."""
        return self._keep[:, : self._cursor].sum(-1)

    def begin(self, n: int, *, padding: Tensor | None = None, tree: Tensor | None = None) -> Step:
        """Open a step of n new tokens; returns their positions and what they may attend to.

        padding is (b, n) bool, True = a real token; the others become holes. tree is (n, n) or (b, n, n) bool, True =
        may attend (a node's ancestors and the node itself); without it a token sees those before it. A token's
        position is the number of tokens of its row before it, in a tree along its path.
        Raises ValueError when the tokens do not fit into the context, or on shapes that do not fit.
        """
        start, end = self._cursor, self._cursor + n
        self._check(n, padding, tree)
        self._clear_pending()
        self._pending = n
        if padding is not None and not bool(padding.all()):
            self._keep[:, start:end] = padding
            self._has_holes = True
        flat = self._storage.flatten(0, 1)
        self._new, self._all = flat.narrow(3, start, n).unbind(), flat.narrow(3, 0, self.reach or end).unbind()
        return Step(self._positions(n, tree), *self._mask(n, tree))

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (b, h_kv, n, d) of the open step; returns views (b, h_kv, slots so far, d) of both."""
        if k.shape[2] != self._pending:
            raise ValueError(f"KVCache: the open step has {self._pending} tokens, got k of shape {tuple(k.shape)}")
        if k.requires_grad or v.requires_grad:
            raise ValueError("KVCache: keys and values that require gradients cannot be cached; use torch.no_grad()")
        at = 2 * layer
        self._new[at].copy_(k)
        self._new[at + 1].copy_(v)
        return self._all[at], self._all[at + 1]

    def key_positions(self, positions: Tensor) -> Tensor:
        """Return the positions of all keys of the open step, (slots so far,) or (b, slots so far).

        `positions` are those of the step's own tokens, (n,) or (b, n); a token before it stands at the number of its
        row's tokens before itself. A hole has the position of the token before it; nothing reads it.
        """
        past = self._slots[: self._cursor]
        if self._has_holes:
            past = (self._keep[:, : self._cursor].cumsum(-1) - 1).clamp(min=0)
        if past.dim() != positions.dim():
            past, positions = (x.expand(self.batch, -1) if x.dim() == 1 else x for x in (past, positions))
        return torch.cat((past, positions), -1)

    def commit(self, path: Tensor | None = None) -> None:
        """Keep the tokens of the open step: all, or those at `path`, and close it.

        path is (b, m) int64: offsets into the step in the order in which the tokens follow each other, -1 = none; rows
        may keep different numbers. The kept keys and values move together to the front of the step.
        """
        start, n = self._cursor, self._pending
        if path is None:
            self._cursor, self._pending = start + n, 0
            return
        path = checked_path("KVCache", self.batch, n, path.to(self._slots.device))
        m = path.shape[1]
        if path.tolist() == [list(range(m))] * self.batch:  # the usual case: everything lies where it belongs
            self._keep[:, start + m : start + n] = True
            self._cursor, self._pending = start + m, 0
            return
        taken = path >= 0
        source = torch.where(taken, path, self._slots[:m])
        step = self._storage.narrow(4, start, n)
        index = source[None, None, :, None, :, None].expand(self.layers, 2, -1, self.kv_heads, -1, self.head_width)
        step.narrow(4, 0, m).copy_(step.gather(4, index))
        keep = self._keep[:, start : start + n]
        kept = taken & keep.gather(1, source)
        keep.fill_(True)
        keep[:, :m] = kept
        self._has_holes = self._has_holes or not bool(kept.all())
        self._cursor, self._pending = start + m, 0

    def snapshot(self) -> Snapshot:
        """Return the committed state, to `restore` later; it costs nothing."""
        self._serial += 1
        return Snapshot(self._cursor, self._has_holes, self._serial)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to an earlier state; what came after it is forgotten.

        Raises ValueError when the cache has since been rewound to before the snapshot, which lost its tokens.
        """
        for serial, cursor in self._rewinds:
            if snapshot.serial <= serial and cursor < 0:
                raise ValueError(f"KVCache: the snapshot at {snapshot.cursor} was lost when rows were moved")
            if snapshot.serial <= serial and cursor < snapshot.cursor:
                raise ValueError(
                    f"KVCache: the snapshot at {snapshot.cursor} was lost when the cache went back to {cursor}"
                )
        self._rewind(snapshot.cursor)
        self._has_holes = snapshot.has_holes

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from the row that was `rows[i]`, (b') int64: rows may repeat, be left out, change in number.

        An open step is forgotten, and so are snapshots.
        """
        self._clear_pending()
        if torch.equal(rows, torch.arange(self.batch, device=rows.device)):
            return
        used, keep = self._storage.narrow(4, 0, self._cursor).index_select(2, rows), self._keep.index_select(0, rows)
        if len(rows) != self.batch:
            self.batch = len(rows)
            shape = (*self._storage.shape[:2], self.batch, *self._storage.shape[3:])
            self._storage = self._storage.new_zeros(shape)
        self._storage.narrow(4, 0, self._cursor).copy_(used)
        self._keep = keep
        self._rewinds = [(self._serial, -1)]

    def trim(self, n: int) -> None:
        """Shorten the open step to its first n tokens: `commit` then means those."""
        if not 1 <= n <= self._pending:
            raise ValueError(f"KVCache: the open step has {self._pending} tokens, it cannot be cut to {n}")
        self._keep[:, self._cursor + n : self._cursor + self._pending] = True
        self._pending = n

    def forget(self, rows: Tensor) -> None:
        """Forget all tokens of these rows, int64; their slots become holes, and their next token has position 0.

        An open step is forgotten, and so are snapshots.
        """
        self._clear_pending()
        self._keep[rows, : self._cursor] = False
        self._has_holes = True
        self._rewinds = [(self._serial, -1)]

    def compact(self) -> None:
        """Move the tokens of each row together, so that the longest row has no holes; shorter ones have them in front.

        An open step is forgotten, and so are snapshots.
        """
        self._clear_pending()
        cursor = self._cursor
        if not self._has_holes or not cursor:
            return
        keep = self._keep[:, :cursor]
        longest = int(keep.sum(-1).max())
        # a stable order: the holes first, then the tokens as they stand
        source = keep.to(torch.uint8).sort(dim=-1, stable=True).indices[:, cursor - longest :]
        index = source[:, None, :, None].expand(-1, self.kv_heads, -1, self.head_width)
        for states in self._storage.flatten(0, 1).unbind():  # one layer's at a time: little memory beside the cache
            states.narrow(2, 0, longest).copy_(states.gather(2, index))
        kept = keep.gather(1, source)
        self._keep[:, :longest] = kept
        self._keep[:, longest:] = True
        self._has_holes = not bool(kept.all())
        self._cursor, self._rewinds = longest, [(self._serial, -1)]

    def reset(self) -> None:
        """Forget everything; the storage stays."""
        self._rewind(0)
        self._has_holes = False

    def _rewind(self, cursor: int) -> None:
        # a rewind to a lower cursor makes the earlier, higher ones redundant, so the list stays short
        self._rewinds = [(s, c) for s, c in self._rewinds if c < cursor]
        self._rewinds.append((self._serial, cursor))
        self._cursor, self._pending = cursor, 0
        self._keep[:, cursor:] = True

    def _check(self, n: int, padding: Tensor | None, tree: Tensor | None) -> None:
        if n < 1 or self._cursor + n > self.context:
            raise ValueError(f"KVCache: {n} tokens after {self._cursor} do not fit into a context of {self.context}")
        check_step("KVCache", self.batch, n, padding, tree)

    def _clear_pending(self) -> None:
        if self._pending and self._has_holes:
            self._keep[:, self._cursor :] = True
        self._pending = 0

    def _positions(self, n: int, tree: Tensor | None) -> Tensor:
        start = self._cursor
        if tree is not None:
            depth = tree.sum(-1) - 1  # (n,) or (b, n)
            depth = depth if depth.dim() == 2 else depth[None]
            return depth + (self.lengths[:, None] if self._has_holes else start)
        if not self._has_holes:
            return self._slots[None, start : start + n]
        # a padded token takes the position of the real one before it; nothing reads it
        count = self._keep[:, : start + n].cumsum(-1) - 1
        return count[:, start:].clamp(min=0)

    def _mask(self, n: int, tree: Tensor | None) -> tuple[Tensor | None, bool]:
        start, end = self._cursor, self._cursor + n
        last = self.reach or end
        holes = self._keep[:, None, None, :last] if self._has_holes else None  # (b, 1, 1, last)
        if tree is None:
            if n == 1 and last == end:
                return holes, False
            if start == 0 and holes is None and last == end:
                return None, True
            seen = self._slots[:last] <= self._slots[start:end, None]  # (n, end)
        else:
            past = torch.ones(*tree.shape[:-1], start, dtype=torch.bool, device=tree.device)
            later = torch.zeros(*tree.shape[:-1], last - end, dtype=torch.bool, device=tree.device)
            seen = torch.cat((past, tree, later), dim=-1)
        seen = seen[None, None] if seen.dim() == 2 else seen[:, None]
        return (seen if holes is None else seen & holes), False
