"""Candidate trees: which guesses of which head are checked together, and trees grown from measured acceptance.

Heads guess the tokens after the newest one, head h the one h + 1 places behind it, each with a ranked list. A node of a
tree takes one rank of one head; its path takes a guess for every place up to it. Nodes stand behind their parents, and
those of a grown tree by falling value, so that the first k of them are the best tree of k nodes.

Shapes: b rows, k nodes, H heads, R ranks.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Table = Sequence[Sequence[float]]
"""Of each head (H) and rank (R) the probability that the guess is right, given that the path before it is."""


class Tree(NamedTuple):
    """A tree of candidates: of each node its parent (a node, -1 = the newest token), its head and its rank.

    >>> tree = Tree((-1, -1, 0), heads=(0, 0, 1), ranks=(0, 1, 0))
    >>> tree.size, tree.depth, tree.first(2)
    (3, 2, Tree(parents=(-1, -1), heads=(0, 0), ranks=(0, 1)))
    """

    parents: tuple[int, ...]
    heads: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def size(self) -> int:
        """k, the number of nodes."""
        return len(self.parents)

    @property
    def depth(self) -> int:
        """The number of tokens on the longest path."""
        return 1 + max(self.heads, default=-1)

    @property
    def is_chain(self) -> bool:
        """Whether every node follows the one before it."""
        return self.parents == tuple(range(-1, self.size - 1))

    def first(self, k: int) -> Tree:
        """The tree of the first k nodes."""
        return Tree(self.parents[:k], self.heads[:k], self.ranks[:k])

    def drawn(self) -> Tree:
        """The same shape where guesses are draws: the j-th of some siblings takes draw j, whatever its rank was.

        Draws without replacement mean something only from the first on, in their order.

        >>> Tree((-1, -1, 0), heads=(0, 0, 1), ranks=(1, 0, 2)).drawn().ranks
        (0, 1, 0)
        """
        before = [self.parents[:node].count(parent) for node, parent in enumerate(self.parents)]
        return self._replace(ranks=tuple(before))

    def tokens(self, candidates: Tensor) -> Tensor:
        """The nodes' tokens (b, k) from the heads' ranked guesses, candidates (b, H, R)."""
        return candidates[:, list(self.heads), list(self.ranks)]


def chain(k: int) -> Tree:
    """The best guess of each of k heads, one behind the other.

    >>> chain(3).parents
    (-1, 0, 1)
    """
    return Tree(tuple(range(-1, k - 1)), tuple(range(k)), (0,) * k)


def product(widths: Sequence[int], budget: int | None = None) -> Tree:
    """The Cartesian product of the `widths[h]` best guesses of each head h: Cai et al. 2024, "Medusa", section 2.1.3.

    It has widths[0] + widths[0] widths[1] + ... nodes. With a `budget` only so many: those whose path is shortest,
    counting a step for each token and one for each rank it lies below the best.

    >>> product([2, 2]).parents, product([2, 3]).size
    ((-1, -1, 0, 0, 1, 1), 8)
    >>> product([2, 3], budget=4).ranks
    (0, 1, 0, 1)
    """
    paths = [path for h in range(len(widths)) for path in itertools.product(*map(range, widths[: h + 1]))]
    if budget is not None:
        chosen = set(sorted(paths, key=lambda path: (len(path) + sum(path), len(path), path))[:budget])
        paths = [path for path in paths if path in chosen]
    return _tree(paths)


def grow(table: Table, size: int) -> Tree:
    """The tree of up to `size` nodes that keeps the most tokens on average, built node by node.

    A node's value is the product of the table's probabilities along its path, which takes heads as independent; the
    node of the largest value comes next (Cai et al. 2024, "Medusa", section 2.3.3). Values fall along a path, so no
    other tree of that size is better. Of equal values the shorter path comes first. Guesses of value 0 stay out.

    >>> grow([[0.6, 0.2], [0.5, 0.1]], 4)
    Tree(parents=(-1, 0, -1, 2), heads=(0, 1, 0, 1), ranks=(0, 0, 1, 0))
    """
    # A path's next sibling is its last rank plus one, its first child one head further: every path is entered once.
    ordered = [sorted(range(len(row)), key=lambda rank, row=row: -row[rank]) for row in table]
    heap: list[tuple[float, int, tuple[int, ...], float]] = []

    def offer(above: tuple[int, ...], place: int, value: float) -> None:
        head = len(above)
        if head < len(table) and place < len(ordered[head]):
            own = value * table[head][ordered[head][place]]
            if own > 0:
                heapq.heappush(heap, (-own, head, (*above, place), value))

    offer((), 0, 1.0)
    paths: list[tuple[int, ...]] = []
    while heap and len(paths) < size:
        value, _, path, above = heapq.heappop(heap)
        paths.append(path)
        offer(path[:-1], path[-1] + 1, above)
        offer(path, 0, -value)
    return _tree([tuple(ordered[h][place] for h, place in enumerate(path)) for path in paths])


def values(tree: Tree, table: Table) -> list[float]:
    """Of each node the probability that it and all before it are right."""
    found: list[float] = []
    for parent, head, rank in zip(*tree, strict=True):
        found.append(table[head][rank] * (1.0 if parent < 0 else found[parent]))
    return found


def expected_length(tree: Tree, table: Table) -> float:
    """The draft tokens that a step keeps on average; the one that the target adds is not counted.

    >>> expected_length(chain(2), [[0.5], [0.5]])
    0.75
    """
    return sum(values(tree, table))


class RankAcceptance:
    """Running estimates of the table, and the trees grown from it.

    `memory` is the number of observations of a head that count: older ones fade exponentially. Before any, a guess of
    rank r is taken to be right with probability prior * 2 ** -r, or with that of `table` (H, R) where one was measured,
    as if that had been seen `weight` times.

    >>> seen = RankAcceptance(heads=2, ranks=2)
    >>> for _ in range(100):
    ...     seen.observe([1, None])  # head 0's second guess was right, none of head 1's
    >>> seen.tree(1).ranks
    (1,)
    """

    def __init__(
        self,
        heads: int,
        ranks: int,
        *,
        prior: float = 0.4,
        weight: float = 2.0,
        memory: float = 200.0,
        table: Table | None = None,
    ):
        before = [[prior * 2.0**-rank for rank in range(ranks)]] * heads if table is None else table
        self._hits = [[weight * share for share in row[:ranks]] for row in before]
        self._tries = [weight] * heads
        self._keep = 1 - 1 / memory
        self._grown: tuple[int, Tree] | None = None
        self._since = 0

    @property
    def table(self) -> list[list[float]]:
        """The estimates, (H, R)."""
        return [[hit / tries for hit in row] for row, tries in zip(self._hits, self._tries, strict=True)]

    def observe(self, ranks: Sequence[int | None]) -> None:
        """Take in how heads 0, 1, ... ranked the tokens that came: None = not among the ranks kept.

        Give as many heads as the step has new tokens: what a head guessed behind a wrong path says nothing.
        """
        for head, rank in enumerate(ranks[: len(self._hits)]):
            row = self._hits[head]
            for other in range(len(row)):
                row[other] = row[other] * self._keep + (other == rank)
            self._tries[head] = self._tries[head] * self._keep + 1
        self._since += 1

    def tree(self, size: int, *, every: int = 16) -> Tree:
        """The grown tree of up to `size` nodes; estimates are read anew after `every` observations, not at each one."""
        if self._grown is None or self._grown[0] < size or self._since >= every:
            largest = max(size, 0 if self._grown is None else self._grown[0])
            self._grown, self._since = (largest, grow(self.table, largest)), 0
        return self._grown[1].first(size)

    def expected_lengths(self, size: int) -> list[float]:
        """The draft tokens that the grown trees of 1, 2, ... up to `size` nodes keep on average."""
        return list(itertools.accumulate(values(grow(self.table, size), self.table)))


def _tree(paths: Sequence[tuple[int, ...]]) -> Tree:
    """The tree of these paths, each a rank for every head up to its own; parents stand before their children."""
    number = {path: node for node, path in enumerate(paths)}
    return Tree(
        tuple(number[path[:-1]] if len(path) > 1 else -1 for path in paths),
        tuple(len(path) - 1 for path in paths),
        tuple(path[-1] for path in paths),
    )
