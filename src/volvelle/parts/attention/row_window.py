"""A cache for pictures larger than those a model was trained on: a window of rows and columns that moves with the pen.

A model that writes pictures of h x w codes in raster order never saw a text longer than h w, nor a row longer than w.
Esser et al. 2021 (section 3.3) let a window of h x w slide over the larger picture and run the model over all of it
again for each code. Here the keys stay where they are, because of two facts about rotary positions:

- Code (r, c) has position m + r w + c, with w of the picture trained on and not of this one. Inside any window the
  distance of two codes, (r - r') w + (c - c'), then is what it is in a picture of the training size, wherever it
  stands; which codes are inside is a matter of the mask.
- What is said before the picture (m tokens: a class, a caption, the sign to begin) must stand right before the window's
  first code. Its keys turn by the distance that the window has gone: R(Δ) k.

The rows that the window has left are forgotten, so the memory is m + h W keys for a picture of any height. One thing
differs from running the window anew: above the first layer a key has seen what its own window showed, a row more.

A token is run to learn which code follows it, so it sees the window of the code that follows. In a wider picture the
code that begins a row follows, inside its window, not the end of the row above but the code at the window's right edge
there: when a row ends, that one is run once more (`again`).

Shapes: b pictures, h x w the window, W columns of the picture, m tokens before its codes, n new tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from volvelle.parts.attention.cache import KVCache, Snapshot, Step

Turn = Callable[[Tensor, int], Tensor]
"""Keys (r, h_kv, m, d) and a distance to the same keys so many positions later."""


class RowWindow(KVCache):
    """Keys and values of what is said before pictures and of the rows that the window shows.

    All pictures of a batch are at the same code, and a step must not reach across a move of the window: `pieces` says
    how a longer text is to be cut. Pictures are as wide as the window or wider. Raises ValueError for steps that reach
    across, for padding and for trees.

    >>> cache = RowWindow.of(said=1, window=(2, 3), columns=3, layers=1, batch=1, kv_heads=1, head_width=2)
    >>> cache.pieces(12)  # two rows but for the last code, which is run for the third row; then the window moves
    [6, 3, 3]
    """

    def __init__(self, storage: Tensor, *, said: int, window: tuple[int, int], columns: int, turn: Turn | None = None):
        super().__init__(storage)
        self.said, self.window, self.columns, self.turn = said, window, columns, turn
        self.told = 0
        """Tokens so far, those of forgotten rows included."""
        self._again = False  # whether the open step is one of `again`
        self._top = self._left = 0  # of the window
        self._spoken: Tensor | None = None  # keys of what is said, at its own positions
        place = torch.arange(self.context, device=storage.device) - said
        self._column = torch.where(place < 0, -1, place % columns)

    @classmethod
    def of(
        cls,
        *,
        said: int,
        window: tuple[int, int],
        columns: int,
        layers: int,
        batch: int,
        kv_heads: int,
        head_width: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        turn: Turn | None = None,
    ) -> RowWindow:
        """Allocate room for what is `said` and the rows of a window (h, w) in a picture of so many `columns`.

        `turn` moves keys on by a number of positions; None: the model's keys do not depend on where they stand.
        """
        if said < 1 or min(window) < 1 or columns < window[1] or (columns > window[1] == 1):
            raise ValueError(
                "RowWindow: said and window must be at least 1, columns as many as the window's or, where that has two "
                f"or more, more; got {said}, {window} and {columns}"
            )
        shape = (layers, 2, batch, kv_heads, said + window[0] * columns, head_width)
        storage = torch.zeros(shape, dtype=dtype, device=device)
        return cls(storage, said=said, window=window, columns=columns, turn=turn)

    @property
    def wide(self) -> bool:
        """Whether the picture is wider than the window."""
        return self.columns > self.window[1]

    def ends_row(self, n: int) -> bool:
        """Whether the next n tokens complete a row of a wide picture."""
        code = self.told + n - self.said
        return self.wide and code > 0 and not code % self.columns

    def again(self) -> int:
        """Let the next step be one token run once more, for the first code of the next row; its `commit` keeps nothing.

        Returns which token, counted from the first. Raises ValueError where no row of a wide picture has just ended.
        """
        if not self.ends_row(0):
            raise ValueError(f"RowWindow: no row of a wide picture ends with token {self.told}")
        self._again = True
        return self.told - self.columns + self.window[1] - 1

    def origin(self, code: int) -> tuple[int, int]:
        """Row and column of the window's first code when this code is written: it stands in the window's last row.

        In a wider picture it stands in the middle column, or nearer to an edge where the picture ends.
        """
        row, column = divmod(code, self.columns)
        h, w = self.window
        return max(0, row - h + 1), min(max(0, column - w // 2), self.columns - w)

    def _seen_by(self, token: int) -> tuple[int, int]:
        """The window's origin when this token is run."""
        following = max(0, token + 1 - self.said)
        return self.origin(following - 1 if self.wide and following and not following % self.columns else following)

    def pieces(self, n: int) -> list[int]:
        """The next n tokens as runs in which the window stands still; in a wide picture a run ends with the row."""
        tokens = range(self.told, self.told + n)
        origins = [self._seen_by(token) for token in tokens]
        starts = [i for i in range(n) if not i or origins[i] != origins[i - 1] or self._begins_row(tokens[i])]
        return [end - start for start, end in zip(starts, [*starts[1:], n], strict=True)]

    def _begins_row(self, token: int) -> bool:
        code = token - self.said
        return self.wide and code > 0 and not code % self.columns

    def begin(self, n: int, *, padding: Tensor | None = None, tree: Tensor | None = None) -> Step:
        """Open a step of n new tokens; returns their positions and which of the window's codes they may attend to."""
        if self._again:
            return self._begin_again(n)
        if tree is not None or (padding is not None and not bool(padding.all())):
            raise ValueError("RowWindow: knows neither padding nor trees: all pictures stand at the same code")
        if len(self.pieces(n)) != 1:
            raise ValueError(f"RowWindow: the window moves within these {n} tokens: cut them as pieces({n}) says")
        if not self.told and n < self.said:
            raise ValueError(f"RowWindow: the first step must hold all {self.said} tokens before the codes, got {n}")
        self._move(*self._seen_by(self.told))
        return self._opened(torch.arange(self.told, self.told + n, device=self._slots.device))

    def _begin_again(self, n: int) -> Step:
        if n != 1:
            raise ValueError(f"RowWindow: one token is to be run once more, got {n}")
        self._move(*self.origin(self.told - self.said))
        token = self.told - self.columns + self.window[1] - 1
        step = self._opened(torch.tensor([token], device=self._slots.device))
        assert step.mask is not None
        mask = step.mask.clone()
        mask[..., self.length - self.columns + self.window[1] - 1] = False  # itself, as it was run before
        return Step(step.positions, mask, False)

    def _opened(self, token: Tensor) -> Step:
        """A step of these tokens, (n,), in the window as it stands."""
        n = len(token)
        step = super().begin(n)
        code = (token - self.said).clamp(min=0)
        position = self.said + code // self.columns * self.window[1] + code % self.columns
        position = torch.where(token < self.said, token, position)[None]
        if not self.wide:
            return Step(position, step.mask, step.causal)
        end = self.length + n
        column, mask = self._column[:end], step.mask
        seen = (column < 0) | ((column >= self._left) & (column < self._left + self.window[1]))
        if mask is None and step.causal:
            mask = self._slots[:end] <= self._slots[self.length : end, None]
        return Step(position, (seen if mask is None else seen & mask).expand(1, 1, n, end), False)

    def commit(self, path: Tensor | None = None) -> None:
        """Keep all tokens of the open step, and close it."""
        if path is not None:
            raise ValueError("RowWindow: a step is kept whole")
        if self._again:
            self._again, self._pending = False, 0
            return
        self.told += self._pending
        super().commit()
        if self._spoken is None:
            self._spoken = self._storage[:, 0, :, :, : self.said].clone()

    def reset(self) -> None:
        """Forget everything; the storage stays."""
        super().reset()
        self.told = self._top = self._left = 0
        self._spoken, self._again = None, False

    def snapshot(self) -> Snapshot:
        """There is none: rows that the window has left do not come back."""
        raise ValueError("RowWindow: has no way back to an earlier state")

    def _move(self, top: int, left: int) -> None:
        """Let the window stand at this row and column: forget the rows above, and bring along what is said."""
        slots = (top - self._top) * self.columns
        if slots:
            kept = self._storage[..., self.said + slots : self.length, :].clone()
            self._rewind(self.length - slots)
            self._storage[..., self.said : self.length, :] = kept
        if (top, left) != (self._top, self._left) and self._spoken is not None and self.turn is not None:
            turned = self.turn(self._spoken.flatten(0, 1), top * self.window[1] + left)
            self._storage[:, 0, :, :, : self.said] = turned.unflatten(0, (self.layers, self.batch))
        self._top, self._left = top, left
