"""The memory of linear attention: one state a layer in place of a cache that grows, behind the same contract.

A step is begin -> append in every layer -> commit, as in cache.py:
    step = cache.begin(n)                                  # positions and mask for all layers
    out, after = linear_attention(q, k, v, rotation=..., mask=..., state=cache.state(layer))
    cache.append(layer, after, k, v, rotation)             # the state behind all n tokens, and what it was made of
    cache.commit()                                         # keep the n tokens; or commit(path): an accepted path
A step that is not committed is forgotten by the next one. A state is a sum over tokens: it cannot let go of one, so a
path is kept by adding its tokens to the state before the step.

Shapes: b batch, h_kv key/value heads, n new tokens, d and d_v features a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from volvelle.parts.attention.cache import Step, check_step, checked_path
from volvelle.parts.attention.linear import FeatureMap, LinearState, elu_plus_one
from volvelle.parts.position.encoding import Turning


class StateSnapshot(NamedTuple):
    """A state of the cache to come back to, as often as wanted."""

    states: tuple[LinearState, ...]
    lengths: Tensor
    length: int
    ragged: bool


class _Written(NamedTuple):
    """What a layer left in the open step; keys and values only where a part of the step can still be chosen."""

    after: LinearState
    k: Tensor | None = None
    v: Tensor | None = None
    rotation: Turning | None = None


class StateCache:
    """The states of all layers, and how many tokens of each row they hold: h_kv d (d_v + 1) numbers a layer and row.

    A step of up to `draft` tokens keeps its keys and values until it is committed, so that any part of it can be kept.
    A longer one (a prompt) is kept whole or not at all, and nothing of it stays but the states.

    >>> cache = StateCache.allocate(layers=1, batch=1, kv_heads=2, head_width=4)
    >>> cache.begin(3).positions
    tensor([[0, 1, 2]])
    >>> k = v = torch.ones(1, 2, 3, 4)
    >>> cache.append(0, cache.state(0).after(k, v), k, v)
    >>> cache.commit(torch.tensor([[0, 2]]))  # the second token was rejected
    >>> cache.length, cache.state(0).z[0, 0], cache.numbers
    (2, tensor([4., 4., 4., 4.]), 40)
    """

    def __init__(self, states: tuple[LinearState, ...], *, draft: int = 256, features: FeatureMap = elu_plus_one):
        """Begin with these states, one a layer; `allocate` makes empty ones. `features` is the φ of the layers."""
        self._states, self._features, self.draft = states, features, draft
        self.layers, (batch, self.kv_heads, self.head_width) = len(states), states[0].z.shape
        self._lengths = torch.zeros(batch, dtype=torch.long, device=states[0].z.device)
        self._cursor = self._pending = 0
        self._ragged = False  # whether rows differ in length
        self._padding: Tensor | None = None
        self._written: list[_Written | None] = []

    @classmethod
    def allocate(
        cls,
        layers: int,
        batch: int,
        kv_heads: int,
        head_width: int,
        value_width: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> StateCache:
        """Empty states in `dtype`, at least fp32; value_width d_v defaults to head_width d."""
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        empty = LinearState.empty(batch, kv_heads, head_width, value_width or head_width, wide, device)
        return cls((empty,) * layers)  # states are replaced, never written to, so all layers may begin with one

    @property
    def batch(self) -> int:
        """The number of rows."""
        return len(self._lengths)

    @property
    def length(self) -> int:
        """The number of tokens in use, the same for all rows (those that a row left out included)."""
        return self._cursor

    @property
    def lengths(self) -> Tensor:
        """The number of tokens in each row, (b,)."""
        return self._lengths.clone()

    @property
    def numbers(self) -> int:
        """How many numbers the committed states hold: the same after one token and after a million."""
        return sum(x.numel() for state in self._states for x in state)

    def state(self, layer: int) -> LinearState:
        """The committed state of a layer."""
        return self._states[layer]

    def begin(self, n: int, *, padding: Tensor | None = None, tree: Tensor | None = None) -> Step:
        """Open a step of n new tokens; returns their positions and what they may see of each other.

        padding is (b, n) bool, True = a real token; the others are left out. tree is (n, n) or (b, n, n) bool, True =
        may attend (a node's ancestors and the node itself); without it a token sees those before it. The step's mask is
        (b, 1, 1, n) for padding, (b or 1, 1, n, n) for a tree; everything committed is seen by all.
        Raises ValueError on shapes that do not fit.
        """
        check_step("StateCache", self.batch, n, padding, tree)
        if padding is not None and tree is not None:
            raise ValueError("StateCache: a step is padded or a tree, not both")
        padding = None if padding is not None and bool(padding.all()) else padding
        self._pending, self._padding = n, padding
        self._written = [None] * self.layers
        mask = None if padding is None else padding[:, None, None]
        if tree is not None:
            mask = tree[None, None] if tree.dim() == 2 else tree[:, None]
        return Step(self._positions(n, padding, tree), mask, tree is None)

    def append(self, layer: int, after: LinearState, k: Tensor, v: Tensor, rotation: Turning | None = None) -> None:
        """Note the state behind the open step, and its keys and values (b, h_kv, n, d), before features and rotation.

        `after` holds all real tokens of the step; `rotation` is that of the step.
        """
        if k.shape[2] != self._pending:
            raise ValueError(f"StateCache: the open step has {self._pending} tokens, got k of shape {tuple(k.shape)}")
        if k.requires_grad or v.requires_grad:
            raise ValueError("StateCache: keys and values that require gradients cannot be kept; use torch.no_grad()")
        whole = self._pending > self.draft
        self._written[layer] = _Written(after) if whole else _Written(after, k, v, rotation)

    def commit(self, path: Tensor | None = None) -> None:
        """Keep the tokens of the open step: all, or those at `path`, and close it.

        path is (b, m) int64: offsets into the step, -1 = none; rows may keep different numbers. Raises ValueError when
        a layer has not written, and for a part of a step that is longer than `draft`.
        """
        n = self._pending
        if path is None:
            taken, m = self._padding, n
        else:
            path = checked_path("StateCache", self.batch, n, path.to(self._lengths.device))
            taken, m = (path[:, :, None] == torch.arange(n, device=path.device)).any(1), path.shape[1]  # taken (b, n)
            taken = taken if self._padding is None else taken & self._padding
        self._states = tuple(self._kept(layer, path, taken) for layer in range(self.layers)) if n else self._states
        self._lengths = self._lengths + (n if taken is None else taken.sum(-1))
        self._ragged = (self._ragged or taken is not None) and bool((self._lengths != self._lengths[0]).any())
        self._cursor += m
        self._close()

    def snapshot(self) -> StateSnapshot:
        """Return the committed state, to `restore` later; it costs nothing, for states are never written to."""
        return StateSnapshot(self._states, self._lengths, self._cursor, self._ragged)

    def restore(self, snapshot: StateSnapshot) -> None:
        """Go back (or forth) to another state, bit for bit; what came after it is forgotten."""
        self._states, self._lengths, self._cursor, self._ragged = snapshot
        self._close()

    def reset(self) -> None:
        """Forget everything."""
        empty = LinearState(*map(torch.zeros_like, self._states[0]))
        self.restore(StateSnapshot((empty,) * self.layers, torch.zeros_like(self._lengths), 0, False))

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from the row that was `rows[i]`, (b',) int64: rows may repeat, be left out, change in number.

        An open step is forgotten.
        """
        self._states = tuple(LinearState(*(x.index_select(0, rows) for x in state)) for state in self._states)
        self._lengths = self._lengths.index_select(0, rows)
        self._close()

    def forget(self, rows: Tensor) -> None:
        """Forget all tokens of these rows, (r,) int64; an open step is forgotten."""
        states = [LinearState(*(x.index_fill(0, rows, 0) for x in state)) for state in self._states]
        self._states, self._lengths = tuple(states), self._lengths.index_fill(0, rows, 0)
        self._ragged = bool((self._lengths != self._lengths[0]).any())
        self._close()

    def adopt(self, row: int, text: StateCache) -> None:
        """Let the text of a cache of one row go on in this row; an open step is forgotten.

        Raises ValueError where it has more rows, or states of another shape.
        """
        ours, theirs = self._states[0], text._states[0]
        if text.batch != 1 or text.layers != self.layers or theirs.s.shape[1:] != ours.s.shape[1:]:
            raise ValueError(
                f"StateCache: one text of {self.layers} layers with states {tuple(ours.s.shape[1:])} is wanted, got "
                f"{text.batch} of {text.layers} with {tuple(theirs.s.shape[1:])}"
            )
        at = torch.tensor([row], device=self._lengths.device)
        pairs = zip(self._states, text._states, strict=True)
        self._states = tuple(
            LinearState(*(x.index_copy(0, at, y) for x, y in zip(one, other, strict=True))) for one, other in pairs
        )
        self._lengths = self._lengths.index_copy(0, at, text._lengths)
        self._ragged = bool((self._lengths != self._lengths[0]).any())
        self.compact()

    def compact(self) -> None:
        """Forget an open step. A state has no slots: there is nothing else to do."""
        self._cursor = int(self._lengths.max())
        self._close()

    def _close(self) -> None:
        self._pending, self._padding, self._written = 0, None, []

    def _kept(self, layer: int, path: Tensor | None, taken: Tensor | None) -> LinearState:
        """The state of a layer when the tokens `taken` (b, n) are kept; None: all."""
        written = self._written[layer]
        if written is None:
            raise ValueError(f"StateCache: layer {layer} has written nothing in the open step")
        if path is None:
            return written.after
        if written.k is not None and written.v is not None:
            state, rotation = self._states[layer], written.rotation
            return state.after(written.k, written.v, rotation=rotation, mask=taken, features=self._features)
        if taken is None or not torch.equal(taken, self._real(taken)):
            raise ValueError(
                f"StateCache: of a step of {self._pending} tokens, more than {self.draft}, no part can be kept"
            )
        return written.after

    def _real(self, like: Tensor) -> Tensor:
        return torch.ones_like(like) if self._padding is None else self._padding

    def _positions(self, n: int, padding: Tensor | None, tree: Tensor | None) -> Tensor:
        """(1, n), or (b, n) where rows differ; a padded token takes the position of the real one before it."""
        before = self._lengths[:, None] if self._ragged else self._lengths[:1, None]
        if tree is not None:
            depth = tree.sum(-1) - 1
            return before + (depth if depth.dim() == 2 else depth[None])
        if padding is not None:
            return (before + padding.cumsum(-1) - 1).clamp(min=0)
        return before + torch.arange(n, device=before.device)
