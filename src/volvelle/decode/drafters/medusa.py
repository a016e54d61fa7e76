"""Drafting with Medusa's heads: one product with the newest state gives a ranked list for every further place.

What is checked is a tree of these guesses (Cai et al. 2024, "Medusa", section 2.1.3): a fixed one, or one grown from
how often each rank of each head was right (section 2.3.3), first on held-out text, then in the answers themselves.

Shapes: b rows, k drafted tokens, K heads, R ranks, r tokens that can be drafted.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from volvelle.decode.contract import Accepted, Draft, Drafter, Drafting, Seen
from volvelle.decode.drafters.fit import check_fit
from volvelle.decode.request import distributions
from volvelle.decode.trees import RankAcceptance, Tree
from volvelle.errors import UsageError
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.draft_head import DraftHeads
from volvelle.systems.language.medusa import MedusaHeads

if TYPE_CHECKING:
    from volvelle.decode.contract import Writer
    from volvelle.decode.request import Request


MEASURED = 40.0
"""The observations that the table measured in training counts for."""


@dataclass(frozen=True)
class Medusa(Drafter):
    """Draft trees of up to `k` tokens from the best `ranks` guesses of each of the `heads`.

    `tree` is a fixed tree, of which a step takes the first nodes; None: the best for what was accepted so far. With
    `drawn` the guesses for sampled requests are drawn from the heads' distributions, without replacement, instead of
    being their likeliest; both are exact. Of a tree draws take the shape: siblings are draws in their order.
    """

    heads: MedusaHeads = field(repr=False)
    k: int = 16
    ranks: int = 10
    tree: Tree | None = None
    drawn: bool = False

    def __post_init__(self) -> None:
        if self.k < 1 or self.ranks < 1:
            raise UsageError(f"medusa: k and ranks must be at least 1, got {self.k} and {self.ranks}")
        tree = self.tree
        if tree is not None and (tree.depth > self.heads.count or max(tree.ranks, default=0) >= self.ranks):
            raise UsageError(
                f"medusa: the tree asks for {tree.depth} heads and rank {max(tree.ranks)}, counted from 0; "
                f"there are {self.heads.count} heads and {self.ranks} ranks"
            )

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The heads."""
        return (self.heads,)

    @property
    def draws(self) -> bool:
        """Whether guesses are `drawn`."""
        return self.drawn

    def begin(self, writer: Writer, requests: Sequence[Request], room: int) -> MedusaDrafting:
        """Make ready for one run; raises VolvelleError where the heads do not fit the model."""
        model = check_fit("medusa: the heads", self.heads, writer, self.heads.width)
        return MedusaDrafting(self, model, len(requests))

    @functools.cached_property
    def projections(self) -> DraftHeads:
        """The models' projections onto the tokens that are drafted."""
        return DraftHeads(self.heads.tokens)


class MedusaDrafting(Drafting):
    """The heads in one run: the newest state of every row, and how its guesses fare."""

    def __init__(self, options: Medusa, model: Decoder, rows: int):
        heads = options.heads
        self.options, self.heads, self.head = options, heads, options.projections.of(model)
        self.ranks = min(options.ranks, self.head.size)
        self.width = options.k if options.tree is None else min(options.k, options.tree.size)
        self.newest = torch.zeros(rows, heads.width, dtype=model.dtype, device=model.device)
        self.known = False
        table = None if heads.acceptance is None else heads.acceptance[:, : self.ranks].tolist()
        measured = {} if table is None else {"table": table, "weight": MEASURED}
        self.acceptance = RankAcceptance(heads.count, self.ranks, **measured)
        self.guesses: list[list[list[int]]] = []

    @property
    def depth(self) -> int:
        """The most tokens on one path."""
        return min(self.width, self.heads.count if self.options.tree is None else self.options.tree.depth)

    def propose(self, requests: Sequence[Request], seen: Seen, k: int) -> Draft | None:
        """Draft a tree of up to k tokens, the same one for all rows."""
        self._take(seen)
        tree = (self.options.tree or self.acceptance.tree(max(k, 0))).first(min(k, self.width))
        if tree.size < 1:
            return None
        logits = self.heads.logits(self.newest, self.head)  # (K, b, r)
        candidates = self.head.words(logits.topk(self.ranks).indices).transpose(0, 1)
        q = None
        if self.options.drawn and not all(request.sampling.greedy for request in requests):
            tree = tree.drawn()
            candidates, places = self._drawn(requests, logits, candidates)
            q = places[:, list(tree.heads)]
        self.guesses = candidates.tolist()
        return Draft(tree.tokens(candidates), None if tree.is_chain else tree.parents, q)

    def _drawn(self, requests: Sequence[Request], logits: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Guesses (b, K, R) in the order of draws without replacement, -1 where none is left, and their q (b, K, v).

        The largest of q_i / e_i, with e_i exponential, is a draw from q; the next largest is one from what is left. A
        head's draws are the same below every parent: only those below one of them are ever looked at.
        """
        chosen, places = candidates.clone(), []
        for k, one in enumerate(logits):
            before = candidates[:, :k, 0].tolist()
            q = distributions(requests, self.head.widened(one), before)
            for row, request in enumerate(requests):
                # A row takes numbers only for tokens it may still write: they do not depend on the other rows.
                if request.finish or request.sampling.greedy or k >= request.left - 1:
                    continue
                noise = torch.Generator(q.device).manual_seed(int(request.uniform() * 2**53))
                race = q[row] / torch.empty_like(q[row]).exponential_(generator=noise)
                best = race.topk(self.ranks)
                chosen[row, k] = best.indices.masked_fill(best.values <= 0, -1)
            places.append(q)
        return chosen, torch.stack(places, 1)

    def observe(self, requests: Sequence[Request], accepted: Accepted, draft: Draft | None) -> None:
        """Note the rank that each head had given to the token that came."""
        if draft is None:
            return
        for tokens, guesses in zip(accepted.tokens, self.guesses, strict=True):
            places = zip(tokens, guesses, strict=False)
            ranks = [guess.index(token) if token in guess else None for token, guess in places]
            if ranks:
                self.acceptance.observe(ranks)

    def join(self, row: int, request: Request) -> None:
        """The row's newest state comes with its prompt."""

    def _take(self, seen: Seen) -> None:
        """The newest state of every row that has gained any."""
        if seen.mask is None:
            self.newest = seen.hidden[:, -1]
            return
        there = seen.mask
        last = torch.arange(there.shape[1], device=there.device).masked_fill(~there, -1).amax(1)
        state = seen.hidden[torch.arange(len(last), device=last.device), last.clamp(min=0)]
        self.newest = torch.where((last >= 0)[:, None], state, self.newest)
