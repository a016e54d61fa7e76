"""N-gram drafts: the likeliest continuations by counts of what followed the last tokens before, as a tree.

    P(t | g) = λ c(g t) / c(g) + (1 - λ) P(t | g without its first token)        λ = c(g) / (c(g) + d · u(g))

c(g t) is how often token t followed the gram g, u(g) how many different tokens did: Witten and Bell 1991, "The
Zero-Frequency Problem", method C for d = 1; behind the shortest gram nothing is known, and P is 0. Counted are the
prompt and the answer so far, and texts that are given: the user's, or answers that the model has written before (the
idea of He et al. 2024, "REST"). A path's chance is the product of its tokens'; the tree of k nodes is grown from the
likeliest down, so that its first j nodes are the best tree of j. Where a text repeats itself the tree is one long path,
elsewhere a bush of guesses, or nothing. No network drafts, and every draft says how likely it is.

Shapes: b rows, k drafted tokens (nodes of the tree).
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from volvelle.decode.contract import Draft, Drafter, Drafting, Seen
from volvelle.decode.drafters.fit import check_vocabulary
from volvelle.decode.drafters.ngram_counts import FixedCounts, GrowingCounts
from volvelle.errors import UsageError
from volvelle.systems.language.encoder_decoder import Answering

if TYPE_CHECKING:
    from volvelle.decode.contract import Writer
    from volvelle.decode.request import Request

_LEAST = 0.02
"""Paths less likely than this are not drafted: no step is wide enough to make them pay."""


@dataclass(frozen=True)
class NGram(Drafter):
    """Draft up to `k` tokens by counts of grams of 1 … `n` tokens, in the request's text and in `texts` (token ids).

    A token of the own text weighs as much as `weight` tokens of the others; `discount` is d. A single request gets a
    tree, several get a chain each. Raises UsageError for options out of range.

    >>> NGram([[5, 6, 7]], n=2).likely((5,), GrowingCounts(2))
    {6: 0.25}
    """

    texts: Sequence[Sequence[int]] = field(default=(), repr=False)
    n: int = 4
    k: int = 15
    weight: float = 4.0
    discount: float = 3.0

    def __post_init__(self) -> None:
        if self.n < 1 or self.k < 1:
            raise UsageError(f"n-grams: n and k must be at least 1, got n={self.n}, k={self.k}")
        if self.weight <= 0 or self.discount <= 0:
            raise UsageError(
                f"n-grams: weight and discount must be above 0, got weight={self.weight}, discount={self.discount}"
            )

    @functools.cached_property
    def stored(self) -> FixedCounts:
        """The counts of the given texts."""
        return FixedCounts(self.texts, self.n)

    def likely(self, context: tuple[int, ...], own: GrowingCounts) -> dict[int, float]:
        """P of the tokens that may follow `context`, of the most frequent ones, counted in `own` and in the texts."""
        found: dict[int, float] = {}
        left = 1.0
        for m in range(min(self.n, len(context)), 0, -1):
            gram = context[len(context) - m :]
            here, there = own.find(gram), self.stored.find(gram)
            total = self.weight * here.total + there.total
            if total == 0:
                continue
            share = left / (total + self.discount * (here.distinct + there.distinct))
            for nexts, weight in ((here.nexts, self.weight), (there.nexts, 1.0)):
                for token, count in nexts.items():
                    found[token] = found.get(token, 0.0) + share * weight * count
            left -= share * total
        return found

    def begin(self, writer: Writer, requests: Sequence[Request], room: int) -> NGramDrafting:
        """Count the prompts of a run; raises VolvelleError where the texts are not of the model's vocabulary."""
        model = writer.model if isinstance(writer, Answering) else writer
        check_vocabulary("n-grams", self.stored.largest, model.config.vocabulary)
        return NGramDrafting(self, requests, writer.device)


class NGramDrafting(Drafting):
    """The counts of one run: of each row its own text's."""

    states = True

    def __init__(self, drafter: NGram, requests: Sequence[Request], device: torch.device):
        self.width, self.drafter, self.device = drafter.k, drafter, device
        self.own = [self._begun(request) for request in requests]
        self.known = [0] * len(requests)

    def join(self, row: int, request: Request) -> None:
        """Count another prompt."""
        self.own[row], self.known[row] = self._begun(request), 0

    def _begun(self, request: Request) -> GrowingCounts:
        counts = GrowingCounts(self.drafter.n)
        counts.extend(request.source or ())
        counts.extend(request.prompt, apart=True)
        return counts

    def propose(self, requests: Sequence[Request], seen: Seen, k: int) -> Draft | None:
        """A tree for a single unfinished row, for several of them a chain each; None where nothing is likely."""
        k = min(k, self.width)
        live = [row for row, request in enumerate(requests) if request.finish is None]
        for row in live:
            self.own[row].extend(requests[row].tokens[self.known[row] :])
            self.known[row] = len(requests[row].tokens)
        if len(requests) == 1 and k > 0:
            tokens, parents, chances = grow(self.drafter, self.own[0], k)
            return Draft(torch.tensor([tokens], device=self.device), parents, chances=chances) if tokens else None
        chains = {row: chain(self.drafter, self.own[row], k) for row in live}
        length = max((len(tokens) for tokens, _ in chains.values()), default=0)
        if length == 0:
            return None
        rows, sums = [[-1] * length for _ in requests], [0.0] * length
        for row, (tokens, chances) in chains.items():
            rows[row][: len(tokens)] = tokens
            for place, chance in enumerate(chances):
                sums[place] += chance / len(live)
        return Draft(torch.tensor(rows, device=self.device), chances=sums)


def grow(drafter: NGram, own: GrowingCounts, k: int) -> tuple[list[int], list[int], list[float]]:
    """The likeliest tree of up to k nodes behind the text: tokens, parents (-1: the text's end) and chances.

    >>> own = GrowingCounts(2)
    >>> own.extend([1, 2, 3, 4, 1, 2])
    >>> grow(NGram(n=2), own, 2)[:2]
    ([3, 4], [-1, 0])
    """
    tokens: list[int] = []
    parents: list[int] = []
    chances: list[float] = []
    order = itertools.count()  # of equal chances the one that was found first
    heap: list[tuple[float, int, int, int, tuple[int, ...]]] = []

    def look(context: tuple[int, ...], chance: float, parent: int) -> None:
        for token, p in drafter.likely(context, own).items():
            if chance * p >= _LEAST:
                heapq.heappush(heap, (-chance * p, next(order), token, parent, context))

    look(tuple(own.text[-drafter.n :]), 1.0, -1)
    while heap and len(tokens) < k:
        negative, _, token, parent, context = heapq.heappop(heap)
        tokens.append(token)
        parents.append(parent)
        chances.append(-negative)
        look((*context, token)[-drafter.n :], -negative, len(tokens) - 1)
    return tokens, parents, chances


def chain(drafter: NGram, own: GrowingCounts, k: int) -> tuple[list[int], list[float]]:
    """The likeliest token k times in turn, and the chance that all up to it are right."""
    context, chance = tuple(own.text[-drafter.n :]), 1.0
    tokens: list[int] = []
    chances: list[float] = []
    while len(tokens) < k:
        likely = drafter.likely(context, own)
        token = max(likely, key=lambda one: likely[one], default=-1)
        chance *= likely.get(token, 0.0)
        if chance < _LEAST:
            break
        tokens.append(token)
        chances.append(chance)
        context = (*context, token)[-drafter.n :]
    return tokens, chances
