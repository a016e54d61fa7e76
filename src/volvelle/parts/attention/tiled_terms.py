"""What a tile of scores gets besides scale * q k^T, and how its gradient leaves the tile again.

Three forms, from the cheapest: a function of distance alone (one number a diagonal), a tensor (a slice a tile), and any
other `Bias` (its own `tile`, evaluated again in the backward pass). None holds more than the bias itself.

Shapes: b batch, h query heads, n_q queries, n_k keys, d features; c = n_q + n_k - 1 diagonals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from volvelle.parts.attention.spec import Shape, Terms
from volvelle.parts.attention.tiles import Tile
from volvelle.parts.position.encoding import Bias

Sums = list[Tensor | None]


class Term:
    """Nothing to add. `inputs` are the tensors that gradients leave through besides q and k."""

    reversed_keys = False
    """Whether tiles list their keys from the last to the first."""
    has_value_term = False
    inputs: tuple[Tensor, ...] = ()
    learnable = False

    def tile(self, tile: Tile) -> Tensor | None:
        """Return (b or 1, h or 1, queries, keys), or None."""
        return None

    def most(self) -> float:
        """Return a number that no entry of any tile exceeds in magnitude; inf where that is not cheap to know."""
        return 0.0

    def start(self) -> Sums:
        """Return what a backward pass sums the gradients of `inputs` up in."""
        return [None] * len(self.inputs)

    def collect(self, sums: Sums, tile: Tile, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Take the gradient (b, h, queries, keys) of one tile of scores; return what its q and k get."""
        return None, None

    def gradients(self, sums: Sums) -> Sums:
        """Return the gradients of `inputs` after a backward pass."""
        return sums

    def values(self, tile: Tile, weights: Tensor) -> Tensor:
        """Return what the weights add to the output besides weights @ v; only with `has_value_term`."""
        raise NotImplementedError

    def collect_values(self, sums: Sums, tile: Tile, weights: Tensor, gradient: Tensor) -> Tensor:
        """Take the output's gradient; return what it means for the weights of this tile."""
        raise NotImplementedError


class _Dense(Term):
    """A bias given as a tensor that broadcasts to (b, h, n_q, n_k)."""

    def __init__(self, bias: Tensor, wide: torch.dtype):
        self.whole = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
        self.inputs, self.wide, self.learnable = (self.whole,), wide, bias.requires_grad

    def most(self) -> float:
        return math.inf

    def _slice(self, x: Tensor, tile: Tile) -> Tensor:
        rows = slice(None) if x.shape[2] == 1 else slice(tile.i0, tile.i1)
        columns = slice(None) if x.shape[3] == 1 else slice(tile.j0, tile.j1)
        return x[:, :, rows, columns]

    def tile(self, tile: Tile) -> Tensor:
        return self._slice(self.whole.detach(), tile).to(self.wide)

    def start(self) -> Sums:
        return [torch.zeros(self.whole.shape, dtype=self.wide, device=self.whole.device) if self.learnable else None]

    def collect(self, sums: Sums, tile: Tile, gradient: Tensor) -> tuple[None, None]:
        if sums[0] is not None:
            target = self._slice(sums[0], tile)
            target.add_(gradient.sum_to_size(target.shape))
        return None, None

    def gradients(self, sums: Sums) -> Sums:
        return [None if x is None else x.to(self.whole.dtype) for x in sums]


class _Diagonals(Term):
    """A bias by distance alone: (h or 1, c) numbers, the lowest distance first.

    With the keys of a tile in reverse order, query a and key b lie at diagonal a + b: the tile is a view of the
    numbers with stride 1 both ways, and its gradient a sum over anti-diagonals.
    """

    reversed_keys = True

    def __init__(self, numbers: Tensor, n_k: int):
        self.numbers, self.n_k, self.inputs = numbers, n_k, (numbers,)
        self.learnable = numbers.requires_grad

    def most(self) -> float:
        return float(self.numbers.detach().abs().max())

    def _range(self, tile: Tile) -> slice:
        begin = tile.i0 + self.n_k - tile.j1
        return slice(begin, begin + tile.i1 - tile.i0 + tile.j1 - tile.j0 - 1)

    def tile(self, tile: Tile) -> Tensor:
        keys = tile.j1 - tile.j0
        return self.numbers.detach()[:, self._range(tile)].unfold(-1, keys, 1)[None]

    def start(self) -> Sums:
        return [torch.zeros_like(self.numbers) if self.learnable else None]

    def collect(self, sums: Sums, tile: Tile, gradient: Tensor) -> tuple[None, None]:
        if sums[0] is not None:
            summed = gradient.sum(0) if gradient.shape[0] > 1 else gradient[0]
            if self.numbers.shape[0] == 1 < summed.shape[0]:
                summed = summed.sum(0, keepdim=True)
            sums[0][:, self._range(tile)].add_(_antidiagonals(summed))
        return None, None


def _antidiagonals(x: Tensor) -> Tensor:
    """Sum x (h, r, c) over its anti-diagonals: (h, r + c - 1).

    A row is added to the one above it, moved by one, which halves the rows; then by two, and so on: two passes over
    the tile in all, in a fixed order. Over an odd number of rows the last one waits.

    >>> _antidiagonals(torch.arange(6.0).view(1, 2, 3))
    tensor([[0., 4., 6., 5.]])
    """
    step, waiting = 1, []
    while x.shape[1] > 1:
        pairs = x.shape[1] // 2
        if x.shape[1] % 2:
            waiting.append((2 * pairs * step, x[:, -1]))
        even, odd, width = x[:, : 2 * pairs : 2], x[:, 1 : 2 * pairs : 2], x.shape[2]
        joined = x.new_empty(x.shape[0], pairs, width + step)
        joined[..., :step], joined[..., width:] = even[..., :step], odd[..., width - step :]
        joined[..., step:width].copy_(even[..., step:]).add_(odd[..., : width - step])
        x, step = joined, 2 * step
    found = x[:, 0]
    for begin, row in waiting:
        longer = x.new_zeros(x.shape[0], max(found.shape[1], begin + row.shape[1]))
        longer[:, : found.shape[1]] = found
        longer[:, begin : begin + row.shape[1]] += row
        found = longer
    return found


class Block(NamedTuple):
    """The tensors of one tile: q (b, h, queries, d) and k (b, h_kv, keys, d) as the caller gave them, widened."""

    q: Tensor
    k: Tensor
    q_positions: Tensor
    k_positions: Tensor

    def part(self, tile: Tile, wide: torch.dtype) -> Block:
        """Cut a tile out of the block of everything."""
        rows, columns = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
        return Block(
            self.q[:, :, rows].to(wide),
            self.k[:, :, columns].to(wide),
            self.q_positions[..., rows],
            self.k_positions[..., columns],
        )


class _Computed(Term):
    """Any other `Bias`: each tile is computed where it is needed, twice when there are gradients."""

    def __init__(self, bias: Bias, whole: Block, wide: torch.dtype):
        self.bias, self.has_value_term, self.learnable = bias, bias.has_value_term, bias.learnable
        self.whole, self.wide = whole._replace(q=whole.q.detach(), k=whole.k.detach()), wide
        self.inputs = ()
        if bias.learnable and torch.is_grad_enabled():
            declared = tuple(x for x in bias.tensors() if x.requires_grad)
            self.inputs = declared or _sources(bias, self._leaves(Tile(0, 1, 0, 1, False)))

    def _leaves(self, tile: Tile) -> Block:
        """The block of a tile whose q and k ask for gradients of their own."""
        block = self.whole.part(tile, self.wide)
        return block._replace(q=block.q.detach().requires_grad_(), k=block.k.detach().requires_grad_())

    def tile(self, tile: Tile) -> Tensor:
        return self.bias.tile(*self.whole.part(tile, self.wide))

    def most(self) -> float:
        return math.inf

    def values(self, tile: Tile, weights: Tensor) -> Tensor:
        block = self.whole.part(tile, self.wide)
        return self.bias.value_term(weights, block.q_positions, block.k_positions)

    @staticmethod
    def _add(sums: Sums, found: Sequence[Tensor | None]) -> None:
        for index, gradient in enumerate(found):
            before = sums[index]
            if gradient is not None:
                sums[index] = gradient if before is None else before + gradient

    def collect(self, sums: Sums, tile: Tile, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if not self.learnable:
            return None, None
        with torch.enable_grad():
            block = self._leaves(tile)
            score = self.bias.tile(*block)
        if not score.requires_grad:
            return None, None
        towards = gradient.sum_to_size(score.shape).to(score.dtype)
        # The graph beyond the tile may be shared with the next tile.
        inputs = (block.q, block.k, *self.inputs)
        found = torch.autograd.grad(score, inputs, towards, retain_graph=True, allow_unused=True)
        self._add(sums, found[2:])
        return found[0], found[1]

    def collect_values(self, sums: Sums, tile: Tile, weights: Tensor, gradient: Tensor) -> Tensor:
        block = self.whole.part(tile, self.wide)
        with torch.enable_grad():
            weights = weights.detach().requires_grad_()
            out = self.bias.value_term(weights, block.q_positions, block.k_positions)
        found = torch.autograd.grad(
            out, (weights, *self.inputs), gradient.to(out.dtype), retain_graph=True, allow_unused=True
        )
        self._add(sums, found[1:])
        assert found[0] is not None
        return found[0]


def make_term(terms: Terms, q: Tensor, k: Tensor, shape: Shape, wide: torch.dtype) -> Term:
    """Choose the cheapest form that the bias of a call allows."""
    bias = terms.bias
    if bias is None:
        return Term()
    if isinstance(bias, Tensor):
        return _Dense(bias, wide)
    numbers = terms.diagonals(q, k, wide)
    if numbers is not None:
        return _Diagonals(numbers, shape.n_k)
    return _Computed(bias, Block(q, k, *terms.positions(q, k)), wide)


def _sources(bias: Bias, block: Block) -> tuple[Tensor, ...]:
    """The leaf tensors whose gradients go through the bias, besides the block's q and k."""
    with torch.enable_grad():
        outputs = [bias.tile(*block)]
        if bias.has_value_term:
            b, h = block.q.shape[:2]
            weights = block.q.new_ones(b, h, 1, 1)
            outputs.append(bias.value_term(weights, block.q_positions, block.k_positions))
    own = {id(block.q), id(block.k)}
    found: dict[int, Tensor] = {}
    nodes = [x.grad_fn for x in outputs if x.grad_fn is not None]
    found |= {id(x): x for x in outputs if x.requires_grad and x.grad_fn is None}
    visited = set(nodes)
    while nodes:
        node = nodes.pop()
        variable = getattr(node, "variable", None)  # of the nodes that end at a leaf
        if variable is not None and id(variable) not in own:
            found[id(variable)] = variable
        for following, _ in node.next_functions:
            if following is not None and following not in visited:
                visited.add(following)
                nodes.append(following)
    return tuple(found.values())
