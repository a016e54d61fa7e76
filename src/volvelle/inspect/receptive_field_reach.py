"""Sets of input coordinates, one for every element of a tensor: what a receptive field is computed with.

A `Reach` belongs to one spatial axis of the input. Its arrays have the tensor's dimensions; one along which nothing
changes is kept with length 1. Coordinates are integers and may lie outside the input. Elements outside the tensor
follow from the period: along dimension i, the element at index j + period covers the coordinates of the element at j,
moved by `move`; so the stride is move / period, a rational number (1/2 after upsampling by 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

Ints = np.ndarray
Step = tuple[int, int, bool]
"""(period, move, whether the place in the input varies) along one dimension; along merged ones it may vary and come
back, as the column does along the pixels of an image in reading order."""
Turn = tuple[int, int]
STILL: Step = (1, 0, False)
NOWHERE = np.iinfo(np.int64).min
"""A tap that reads nothing: a transposed convolution has fewer taps for some outputs than for others."""


@dataclass(frozen=True)
class Reach:
    """For every element: a set (bit k of `mask` stands for coordinate `low` + k; 0 is the empty set), and `whole`.

    `whole` marks elements that depend on the whole input by construction (global pooling, attention), besides what
    the set holds. A `bounded` reach knows nothing outside the tensor: padding is the empty set, and a reduction over
    all positions is the exact union instead of `whole`.
    """

    shape: tuple[int, ...]
    low: Ints
    mask: Ints
    whole: Ints
    steps: tuple[Step, ...]
    bounded: bool
    cut: bool = False
    """Whether something outside was asked for that the period does not tell, the tensor being shorter than it."""

    @classmethod
    def identity(cls, shape: Sequence[int], dim: int, *, bounded: bool) -> Reach:
        """Every element depends on its own index along `dim`."""
        sizes = [n if i == dim else 1 for i, n in enumerate(shape)]
        low = np.arange(shape[dim]).reshape(sizes)
        steps = tuple((1, 1, True) if i == dim else STILL for i in range(len(shape)))
        return cls(tuple(shape), low, _ones(sizes), np.zeros(sizes, bool), steps, bounded)

    @property
    def empty(self) -> Ints:
        """Where the set is empty."""
        return self.mask == 0

    @property
    def high(self) -> Ints:
        """The largest coordinate; below `low` where the set is empty."""
        return self.low + _bits(self.mask) - 1

    def carries(self, dim: int) -> bool:
        """Whether the field moves along this dimension."""
        return self.steps[dim][2]

    def window(self, dim: int, taps: Ints, turn: Turn | None) -> Reach:
        """The union over taps: element j of the result sees `taps[j]` (n_out, k) of `dim`.

        `turn` (p, q) is their regularity: taps[j + p] = taps[j] + q, None when there is none. Taps outside
        the tensor see what the period says, in a bounded reach nothing.
        """
        count = len(taps)
        shape = (*self.shape[:dim], count, *self.shape[dim + 1 :])
        period, move, varies = self.steps[dim]
        step = _composed(self.steps[dim], turn) if turn else (count, round(count * move / period), varies)
        steps = (*self.steps[:dim], step, *self.steps[dim + 1 :])
        inside = (taps >= 0) & (taps < self.shape[dim])
        known = inside if self.bounded or self.steps[dim][0] > self.shape[dim] else taps != NOWHERE
        if self.low.shape[dim] == 1 and not self.carries(dim):
            same = replace(self, shape=shape, steps=(*self.steps[:dim], STILL, *self.steps[dim + 1 :]))
            alive = known.any(1)
            if alive.all():
                return same
            keep = alive.reshape([-1 if i == dim else 1 for i in range(len(shape))])
            return replace(same, low=same.low + 0 * keep, mask=same.mask * keep.astype(object), whole=same.whole & keep)
        full = self._spread(dim)
        found = None
        for k in range(taps.shape[1]):
            part = full._take(dim, taps[:, k], known[:, k])
            found = part if found is None else found._join(part)
        assert found is not None
        outside = bool(((taps != NOWHERE) & ~known).any()) and not self.bounded
        return replace(found, shape=shape, steps=steps, cut=found.cut or outside)

    def _take(self, dim: int, index: Ints, known: Ints) -> Reach:
        period, move, _ = self.steps[dim]
        outside = known & ((index < 0) | (index >= self.shape[dim]))
        turns = np.where(outside, index // period, 0)
        place = np.where(outside, index % period, np.where(known, index, 0))
        sizes = [-1 if i == dim else 1 for i in range(self.low.ndim)]
        low = self.low.take(place, dim) + (turns * move * known).reshape(sizes)
        seen = known.reshape(sizes)
        return replace(
            self,
            low=low,
            mask=self.mask.take(place, dim) * seen.astype(object),
            whole=self.whole.take(place, dim) & seen,
        )

    def _spread(self, *dims: int) -> Reach:
        """Full length along some dimensions."""
        sizes = tuple(self.shape[i] if i in dims else n for i, n in enumerate(self.low.shape))
        if sizes == self.low.shape:
            return self
        low, mask, whole = (np.broadcast_to(x, sizes) for x in (self.low, self.mask, self.whole))
        return replace(self, low=low, mask=mask, whole=whole)

    def _join(self, other: Reach) -> Reach:
        """Union of arrays that broadcast; shape and steps stay those of `self`."""
        if self is other:
            return self
        ours, theirs = self.empty, other.empty
        a, b = np.where(ours, other.low, self.low), np.where(theirs, self.low, other.low)
        low = np.minimum(a, b)
        mask = (self.mask << (a - low).astype(object)) | (other.mask << (b - low).astype(object))
        return replace(self, low=low, mask=mask, whole=self.whole | other.whole, cut=self.cut or other.cut)

    def union(self, other: Reach, shape: Sequence[int]) -> Reach:
        """Element by element after broadcasting both to `shape`; equal regularity is kept."""
        a, b = self.broadcast(shape), other.broadcast(shape)
        if a is b or (a.low is b.low and a.mask is b.mask and a.whole is b.whole):
            return a
        found = a._join(b)
        if not b.mask.any():
            return replace(found, steps=a.steps)
        if not a.mask.any():
            return replace(found, steps=b.steps)
        steps = tuple(_agreed(x, y, n) for x, y, n in zip(a.steps, b.steps, shape, strict=True))
        return replace(found, steps=steps)

    def broadcast(self, shape: Sequence[int]) -> Reach:
        """Add leading dimensions and repeat those of length 1."""
        shape = tuple(shape)
        if shape == self.shape:
            return self
        lead = len(shape) - len(self.shape)
        old = (1,) * lead + self.shape
        steps = tuple(
            STILL if was == 1 and now != 1 else step
            for was, now, step in zip(old, shape, (STILL,) * lead + self.steps, strict=True)
        )
        return replace(self._as(lambda x: x.reshape((1,) * lead + x.shape)), shape=shape, steps=steps)

    def _part(self, dim: int, start: int, stop: int | None) -> Reach:
        """Elements start to stop of the arrays along one dimension; shape and steps stay."""
        return self._as(lambda x: x[(slice(None),) * dim + (slice(start, stop),)])

    def _as(self, change: Callable[[Ints], Ints]) -> Reach:
        return replace(self, low=change(self.low), mask=change(self.mask), whole=change(self.whole))

    def reduce(self, dims: Sequence[int], *, keep: bool = True) -> Reach:
        """The union over dimensions. Where the field moved along these alone, an unbounded reach becomes `whole`."""
        dims = sorted({dim % len(self.shape) for dim in dims})
        moving = [i for i in range(len(self.shape)) if self.carries(i) and self.shape[i] > 1]
        covered = bool(moving) and all(i in dims for i in moving)
        found = self
        for dim in dims:
            while found.low.shape[dim] > 1:
                half = found.low.shape[dim] // 2
                rest = found._part(dim, 2 * half, None)
                found = found._part(dim, 0, half)._join(found._part(dim, half, 2 * half))
                if rest.low.shape[dim]:
                    found = found._join(rest._as(lambda x, n=half, dim=dim: np.repeat(x, n, dim)))
        shape = tuple(1 if i in dims else n for i, n in enumerate(self.shape))
        steps = tuple(STILL if i in dims and self.shape[i] > 1 else step for i, step in enumerate(self.steps))
        found = replace(found, shape=shape, steps=steps)
        if covered and not self.bounded:
            found = replace(found, mask=found.mask * 0, whole=found.whole | (found.mask != 0))
        if keep:
            return found
        kept = [n for i, n in enumerate(shape) if i not in dims]
        return found.reshape(kept)

    def everything(self) -> Reach:
        """The union over all elements, for operations of which nothing better is known; dimensions of length 1."""
        return self.reduce(range(len(self.shape)))

    def expand(self, shape: Sequence[int]) -> Reach:
        """The same set everywhere in a tensor of another shape; only after `everything`."""
        ones = (1,) * len(shape)
        found = self._as(lambda x: x.reshape(ones))
        return replace(found, shape=tuple(shape), steps=(STILL,) * len(shape))

    def _as_whole(self, extent: int | None) -> Reach:
        """Everything: `whole`, or when the extent is given the set of all its coordinates."""
        if extent is None:
            return replace(self, whole=np.ones_like(self.whole))
        return replace(self, low=self.low * 0, mask=_ones(self.mask.shape) * ((1 << extent) - 1))

    def permute(self, order: Sequence[int]) -> Reach:
        """Dimensions in another order."""
        found = self._as(lambda x: x.transpose(order))
        return replace(found, shape=tuple(self.shape[i] for i in order), steps=tuple(self.steps[i] for i in order))

    def reshape(self, shape: Sequence[int]) -> Reach:
        """The same elements, in the same order, in another shape."""
        shape = tuple(shape)
        found, sizes, steps = self, [], []
        for old, new in _groups(self.shape, shape):
            inner = [self.low.shape[i] for i in old]
            kept = [shape[i] for i in new]
            if all(n == 1 for n in inner):
                sizes += [1] * len(new)
            else:
                found = found._spread(*old)
                sizes += kept
            steps += _regrouped([self.shape[i] for i in old], [self.steps[i] for i in old], kept)
        found = found._as(lambda x: x.reshape(sizes))
        return replace(found, shape=shape, steps=tuple(steps))._observed()

    def _observed(self) -> Reach:
        """Replace a period as long as the dimension by a shorter one that holds throughout."""
        steps = list(self.steps)
        for dim, (period, _, _) in enumerate(self.steps):
            n = self.low.shape[dim]
            if n > 1 and period >= n:
                steps[dim] = self._period(dim) or steps[dim]
        return replace(self, steps=tuple(steps))

    def _period(self, dim: int) -> Step | None:
        varies, n = self.steps[dim][2], self.low.shape[dim]
        for period in range(1, n // 2 + 1):
            first, second = self._part(dim, 0, n - period), self._part(dim, period, n)
            moves = np.unique((second.low - first.low)[~first.empty])
            if len(moves) <= 1 and (first.mask == second.mask).all() and (first.whole == second.whole).all():
                return (period, int(moves[0]) if len(moves) else 0, varies)
        return None

    def cat(self, others: Sequence[Reach], dim: int) -> Reach:
        """Tensors behind each other along `dim`; the others must have the same dimensions apart from it."""
        parts = [self, *others]
        n = sum(part.shape[dim] for part in parts)
        shape = (*self.shape[:dim], n, *self.shape[dim + 1 :])
        plain = all(part.low.shape[dim] == 1 for part in parts)
        if plain and all(_same(self, part) for part in others):
            return replace(self, shape=shape)
        sizes = np.broadcast_shapes(
            *(tuple(1 if i == dim else m for i, m in enumerate(part.low.shape)) for part in parts)
        )
        full = [
            part._spread(dim)._as(
                lambda x, part=part: np.broadcast_to(x, (*sizes[:dim], part.shape[dim], *sizes[dim + 1 :]))
            )
            for part in parts
        ]
        low, mask, whole = (np.concatenate([getattr(f, name) for f in full], dim) for name in ("low", "mask", "whole"))
        steps = list(self.steps)
        for i in range(len(shape)):
            for part in others:
                steps[i] = _agreed(steps[i], part.steps[i], shape[i])
        travelled = sum(part.shape[dim] * part.steps[dim][1] / part.steps[dim][0] for part in parts)
        steps[dim] = (n, round(travelled), any(part.carries(dim) for part in parts))
        cut = any(part.cut for part in parts)
        return replace(self, shape=shape, low=low, mask=mask, whole=whole, steps=tuple(steps), cut=cut)._observed()

    def compact(self) -> Reach:
        """Length 1 along every dimension in which nothing changes."""
        found = self
        for dim, n in enumerate(self.low.shape):
            if n > 1:
                first = found._part(dim, 0, 1)
                if (
                    (first.mask == found.mask).all()
                    and (first.whole == found.whole).all()
                    and ((first.low == found.low) | found.empty).all()
                ):
                    steps = tuple(STILL if i == dim else step for i, step in enumerate(found.steps))
                    found = replace(first, steps=steps)
        return found


def _ones(sizes: Sequence[int]) -> Ints:
    found = np.empty(sizes, object)
    found.fill(1)
    return found


def _bits(mask: Ints) -> Ints:
    return np.asarray(np.frompyfunc(int.bit_length, 1, 1)(mask), np.int64)


def counts(mask: Ints) -> Ints:
    """How many coordinates each set holds."""
    return np.asarray(np.frompyfunc(int.bit_count, 1, 1)(mask), np.int64)


def _same(a: Reach, b: Reach) -> bool:
    arrays = ((a.low, b.low), (a.mask, b.mask), (a.whole, b.whole))
    return all(x is y or (x.shape == y.shape and bool((x == y).all())) for x, y in arrays)


def _composed(step: Step, turn: Turn) -> Step:
    """Regularity of taps with `turn` on a dimension with `step`."""
    (period, move, varies), (p, q) = step, turn
    if step == STILL or q == 0:
        return STILL
    times = period // math.gcd(period, abs(q))
    return p * times, move * q * times // period, varies


def _agreed(a: Step, b: Step, n: int) -> Step:
    """The regularity of a union; where both move differently, the faster one over the whole length."""
    if a == b:
        return a
    period, varies = math.lcm(a[0], b[0]), a[2] or b[2]
    moves = (a[1] * period // a[0], b[1] * period // b[0])
    if moves[0] == moves[1]:
        return period, moves[0], varies
    fast = max((a, b), key=lambda step: abs(step[1] / step[0]))
    return max(n, 1), round(max(n, 1) * fast[1] / fast[0]), varies


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions with equal products."""
    found, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b = ([i], [j]) if i < len(old) and j < len(new) else (list(range(i, len(old))), list(range(j, len(new))))
        while math.prod(old[k] for k in a) != math.prod(new[k] for k in b):
            if math.prod(old[k] for k in a) < math.prod(new[k] for k in b):
                a.append(a[-1] + 1)
            else:
                b.append(b[-1] + 1)
        found.append((a, b))
        i, j = i + len(a), j + len(b)
    return found


def _regrouped(sizes: Sequence[int], steps: Sequence[Step], kept: Sequence[int]) -> list[Step]:
    """Regularity after merging dimensions into one and splitting that into `kept`."""
    if list(sizes) == list(kept):
        return list(steps)
    long = [(n, step) for n, step in zip(sizes, steps, strict=True) if n > 1]
    if not long:
        return [STILL] * len(kept)
    period, move, _ = long[0][1]
    varies = any(step[2] for _, step in long)
    if len(long) > 1:
        # The first dimension repeats only after all that lies inside it.
        period *= math.prod(n for n, _ in long[1:])
    found = []
    for i, n in enumerate(kept):
        inner = math.prod(kept[i + 1 :])
        times = period // math.gcd(period, inner)
        found.append((times, move * times * inner // period, varies) if n > 1 else STILL)
    return found
