"""Keys and values that come before a text and are not written by it: what prefix and prompt tuning learn.

`Before` stands where a cache stands, for passes without one: begin -> append in every layer, but nothing is stored and
gradients flow. Since every layer asks it for its own keys and values, a layer that is recomputed (checkpointing) sees
them again. With a cache they are written into its first slots once (`fill`). `Recorder` stands in the same place and
notes the keys and values that a pass makes; they can come before another text.

Shapes: b batch, h_kv key/value heads, l keys that come before, n new tokens, d features a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from volvelle.parts.attention.cache import KVCache, Step

if TYPE_CHECKING:
    from collections.abc import Iterator


class Past(Protocol):
    """What the layers of one pass ask of what lies before the new tokens: `KVCache`, `Before` and `Recorder` are it."""

    @property
    def length(self) -> int:
        """The number of keys before the new tokens."""
        ...

    def begin(self, n: int, *, padding: Tensor | None = None, tree: Tensor | None = None) -> Step:
        """Open a step of n new tokens."""
        ...

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return all keys and values that the new tokens of this layer may attend to, their own last."""
        ...

    def key_positions(self, positions: Tensor) -> Tensor:
        """Return the positions of all keys, for the step's own `positions`."""
        ...


class Before:
    """Given keys and values, visible to every new token, at the positions 0 .. l - 1; the text begins at l.

    `states` is (layers, 2, b or 1, h_kv, l, d), keys first, as they are after any rotation. `present` (b, l) bool says
    which of them a row has, where rows differ; the others are holes, and positions count what is there.

    >>> before = Before(torch.zeros(1, 2, 1, 2, 3, 4))
    >>> step = before.begin(2)
    >>> step.positions, step.mask[0, 0].int()
    (tensor([[3, 4]]), tensor([[1, 1, 1, 1, 0],
            [1, 1, 1, 1, 1]], dtype=torch.int32))
    >>> k, v = before.append(0, torch.ones(5, 2, 2, 4), torch.ones(5, 2, 2, 4))
    >>> k.shape
    torch.Size([5, 2, 5, 4])
    """

    def __init__(self, states: Tensor, present: Tensor | None = None) -> None:
        if states.dim() != 6 or states.shape[1] != 2 or states.shape[4] < 1:
            raise ValueError(f"Before: states must be (layers, 2, b, h_kv, l, d), got {tuple(states.shape)}")
        if present is not None and tuple(present.shape) != (states.shape[2], states.shape[4]):
            raise ValueError(
                f"Before: present must be (b, l) = {(states.shape[2], states.shape[4])}, got {tuple(present.shape)}"
            )
        self.states, self.present = states, present
        self._book: KVCache | None = None

    @property
    def length(self) -> int:
        """The number of keys, holes included."""
        return self.states.shape[4]

    @property
    def lengths(self) -> Tensor | int:
        """The number of keys a row: (b, 1), or one number for all rows."""
        return self.length if self.present is None else self.present.sum(-1, keepdim=True)

    def begin(self, n: int, *, padding: Tensor | None = None, tree: Tensor | None = None) -> Step:
        """Open a step of n new tokens: what a cache that held these keys would answer (see `KVCache.begin`)."""
        # A cache without features keeps the books, so that positions and masks are the cached ones by construction.
        rows = [len(x) for x in (self.present, padding) if x is not None]
        rows += [len(tree)] if tree is not None and tree.dim() == 3 else []
        book = KVCache.allocate(1, max(rows, default=1), 1, self.length + n, 0, device=self.states.device)
        book.begin(self.length, padding=self.present)
        book.commit()
        self._book = book
        return book.begin(n, padding=padding, tree=tree)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return these keys and values of the layer with k and v (b, h_kv, n, d) behind them."""
        keys, values = self._rows(layer, k)
        return torch.cat((keys, k), 2), torch.cat((values, v), 2)

    def widened(self, mask: Tensor | None, reach: int) -> Tensor | None:
        """A bool mask (b or 1, h or 1, n, reach) with the columns of these keys in front; None: all is visible."""
        if self.present is None:
            return None if mask is None else torch.nn.functional.pad(mask, (self.length, 0), value=True)
        if mask is None:
            mask = self.present.new_ones(1, 1, 1, reach)
        front = self.present[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
        return torch.cat((front, mask.expand(len(front), -1, -1, -1)), -1)

    def key_positions(self, positions: Tensor) -> Tensor:
        """Return the positions of all keys of the open step, (l + n,) or (b, l + n)."""
        if self._book is None:
            raise ValueError("Before: begin a step first")
        if positions.dim() == 1 or len(positions) == self._book.batch:
            return self._book.key_positions(positions)
        past = self._book.key_positions(positions[:1])[:, : self.length]
        return torch.cat((past.expand(len(positions), -1), positions), -1)

    @torch.no_grad()
    def fill(self, cache: KVCache) -> None:
        """Write these keys and values into the first slots of an empty cache, which has room for them."""
        if cache.length:
            raise ValueError(f"Before: the cache already holds {cache.length} tokens")
        if len(self.states) != cache.layers:
            raise ValueError(f"Before: keys for {len(self.states)} layers, but the cache has {cache.layers}")
        present = None if self.present is None else self.present.expand(cache.batch, -1)
        cache.begin(self.length, padding=present)
        for layer, (keys, values) in enumerate(self.states.detach()):
            cache.append(layer, keys, values)
        cache.commit()

    def _rows(self, layer: int, k: Tensor) -> Iterator[Tensor]:
        return (part.to(k.dtype).expand(len(k), -1, -1, -1) for part in self.states[layer])


class Recorder:
    """Notes the keys and values of a pass that has nothing before it.

    >>> recorder = Recorder()
    >>> k, v = recorder.append(0, torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    >>> recorder.states.shape
    torch.Size([1, 2, 1, 2, 3, 4])
    """

    length = 0

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device, self._layers = device, dict[int, Tensor]()

    def begin(self, n: int, *, padding: Tensor | None = None, tree: Tensor | None = None) -> Step:
        """Open a step of n tokens in causal order."""
        if padding is not None or tree is not None:
            raise ValueError("Recorder: what comes before a text has no padding and is no tree")
        return Step(torch.arange(n, device=self.device)[None], None, True)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Note k and v (b, h_kv, n, d) and return them."""
        self._layers[layer] = torch.stack((k, v))
        return k, v

    def key_positions(self, positions: Tensor) -> Tensor:
        """Return the tokens' own positions: there are no other keys."""
        return positions

    @property
    def states(self) -> Tensor:
        """All of it, (layers, 2, b, h_kv, n, d), as `Before` takes it."""
        return torch.stack([self._layers[layer] for layer in sorted(self._layers)])
