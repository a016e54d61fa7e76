"""Drafting with the modules of multi-token prediction, token by token over caches of their own.

A decoding loop runs the decoder over new tokens, chooses the token that follows the last of them, and tells the drafts
both; they then propose what comes after it:

    hidden, states = mtp.read(model, ids, cache=cache)      # the tokens so far; ids (b, m)
    drafts.observe(states, following)                       # following (b, m): the token after each of them
    drafted = drafts.draft(3)                               # the three tokens after following[:, -1]

Only tokens that are final may be observed. Drafting leaves no trace: what it wrote into the caches is taken back.

Shapes: b rows, m new positions, k drafted tokens, r tokens that can be drafted, D depths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from volvelle.errors import VolvelleError
from volvelle.parts.attention.cache import KVCache
from volvelle.systems.language.components import Step
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.draft_head import DraftHead
from volvelle.systems.language.mtp import MTP, MTPModule, ParallelMTP, SequentialMTP, token_embeddings

Choose = Callable[[Tensor], Tensor]


class Drafted(NamedTuple):
    """Proposed tokens (b, k), and the logits (b, k, r) that each was chosen from."""

    tokens: Tensor
    logits: Tensor


class Drafts:
    """What the modules remember of `batch` texts of up to `context` tokens; `drafts_of` makes the right kind.

    `head` is the projection onto the tokens that can be drafted, by default that of the modules' own list.
    """

    def __init__(self, mtp: MTP, model: Decoder, batch: int, context: int, *, head: DraftHead | None = None):
        self.mtp, self.model, self.head = mtp, model, head or DraftHead(model, mtp.tokens)
        self.caches = [model.new_cache(batch, context, blocks=1) for _ in range(mtp.depths)]
        self.paths = [None] * mtp.depths if mtp.training else mtp.paths(model)
        # Of each depth the newest state of every row, and whether the row has one.
        self.newest = [torch.zeros(batch, model.config.width, dtype=model.dtype, device=model.device)] * mtp.depths
        self.known = [torch.zeros(batch, dtype=torch.bool, device=model.device)] * mtp.depths

    @torch.no_grad()
    def observe(self, states: Tensor, following: Tensor, mask: Tensor | None = None) -> None:
        """Take in m more positions of every row: states (b, m, width) as `MTP.read` gives them, the next tokens (b, m).

        `mask` (b, m) is False where a row has none (padding on any side, tokens that were rejected).
        """
        if tuple(states.shape[:2]) != tuple(following.shape):
            raise VolvelleError(
                f"drafts: states {tuple(states.shape)} and next tokens {tuple(following.shape)} do not fit"
            )
        mask = torch.ones_like(following, dtype=torch.bool) if mask is None else mask
        start, m = 0, following.shape[1]
        while start < m:
            part = slice(start, start + self._make_room(m - start))
            self._take(states[:, part], following[:, part], mask[:, part])
            start = part.stop

    @torch.no_grad()
    def draft(self, k: int, choose: Choose | None = None, *, rows: Tensor | None = None) -> Drafted:
        """Propose the k tokens after the last one observed; `choose` maps logits (b, r) to tokens (b,).

        Without it the likeliest token is taken. `rows` (b,) are True where drafts are wanted, None: everywhere; what is
        proposed elsewhere means nothing.

        Raises VolvelleError before anything was observed in every row that is wanted.
        """
        known = self.known[0] if rows is None else self.known[0] | ~rows
        if not bool(known.all()):
            raise VolvelleError("drafts: a row has nothing to follow; observe at least one position of each")
        self._make_room(k)
        return self._propose(k, choose or self._likeliest)

    def forget(self, row: int) -> None:
        """Forget the text of this row: another begins there."""
        at = torch.tensor([row], device=self.model.device)
        for cache in self.caches:
            cache.forget(at)
        self.known = [known.index_fill(0, at, False) for known in self.known]

    def reset(self) -> None:
        """Forget everything."""
        for cache in self.caches:
            cache.reset()
        self.known = [torch.zeros_like(known) for known in self.known]

    def _make_room(self, m: int) -> int:
        """How many of m positions the caches take now; rows that grow unevenly leave holes, which are closed first."""
        free = m
        for cache in self.caches:
            if isinstance(cache, KVCache):
                if cache.context - cache.length < m:
                    cache.compact()
                free = min(free, cache.context - cache.length)
        if free < 1:
            raise VolvelleError(f"drafts: no room for {m} more positions; begin with a larger context")
        return free

    def _likeliest(self, logits: Tensor) -> Tensor:
        return self.head.words(logits.argmax(-1))

    def _take(self, states: Tensor, following: Tensor, mask: Tensor) -> None:
        raise NotImplementedError

    def _propose(self, k: int, choose: Choose) -> Drafted:
        raise NotImplementedError

    def _run(self, depth: int, x: Tensor, step: Step) -> Tensor:
        """The block of a depth."""
        path = self.paths[depth]
        return self.mtp.block(self.mtp.layers[depth])(x, step) if path is None else path(x, step)

    def _open(self, depth: int, states: Tensor, mask: Tensor) -> Step:
        """What the block of a depth needs to know about the next entries of its cache."""
        cache = self.caches[depth]
        opened = cache.begin(states.shape[1], padding=None if bool(mask.all()) else mask)
        return self.model.shared(states, opened.positions, opened.mask, opened.causal, cache)

    def _close(self, depth: int, mask: Tensor) -> None:
        """Keep the entries, side by side."""
        if bool(mask.all()):
            self.caches[depth].commit()
            return
        order = mask.logical_not().sort(dim=1, stable=True).indices
        self.caches[depth].commit(torch.where(mask.gather(1, order), order, -1))


class SequentialDrafts(Drafts):
    """Depth k at position i reads t_{i+k}, so it is k - 1 positions behind depth 1 until drafts fill the gap.

    Depths beyond D repeat the last module on its own state, as servers do with DeepSeek-V3's single one.
    """

    def _take(self, states: Tensor, following: Tensor, mask: Tensor) -> None:
        self._advance(0, states, following, mask)

    def _advance(self, first: int, states: Tensor, tokens: Tensor, mask: Tensor) -> None:
        """Enter (state, token) pairs at depth `first`, and what follows from them at the depths behind it."""
        for depth in range(first, self.mtp.depths):
            if not bool(mask.any()):
                return
            step = self._open(depth, states, mask)
            module = cast(MTPModule, self.mtp.layers[depth])
            h = self._run(depth, module.enter(states, token_embeddings(self.model, tokens)), step)
            self._close(depth, mask)
            # The next depth pairs the same token with the state one position earlier.
            states, mask = self._shift(depth, h, mask)

    def _shift(self, depth: int, h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Of each entry the state of the entry before it in its row, where there is one; remember the newest."""
        b, m, width = h.shape
        seen = torch.cat((self.newest[depth][:, None].to(h.dtype), h), 1)
        place = torch.arange(1, m + 1, device=h.device).expand(b, m)
        newest = place.masked_fill(~mask, 0).cummax(1).values
        before = torch.cat((newest.new_zeros(b, 1), newest[:, :-1]), 1)
        earlier = seen.gather(1, before[..., None].expand(-1, -1, width))
        known = self.known[depth]
        there = mask & (known[:, None] | (before > 0))
        self.newest[depth] = seen.gather(1, newest[:, -1:, None].expand(-1, -1, width))[:, 0]
        self.known[depth] = known | mask.any(1)
        return earlier, there

    def _propose(self, k: int, choose: Choose) -> Drafted:
        snapshots = [cache.snapshot() for cache in self.caches]
        kept = list(self.newest), list(self.known)
        last = self.mtp.depths - 1
        tokens, logits = [], []
        try:
            for j in range(k):
                depth = min(j, last)
                state = self.newest[depth]
                module = cast(MTPModule, self.mtp.layers[depth])
                logits.append(self.head.logits(module.shared_head["norm"](state)))
                tokens.append(choose(logits[-1]))
                if j + 1 < k:
                    mask = torch.ones(len(state), 1, dtype=torch.bool, device=state.device)
                    self._advance(min(j + 1, last), state[:, None], tokens[-1][:, None], mask)
        finally:
            for cache, snapshot in zip(self.caches, snapshots, strict=True):
                cache.restore(snapshot)
            self.newest, self.known = kept
        return Drafted(torch.stack(tokens, 1), torch.stack(logits, 1))


class ParallelDrafts(Drafts):
    """All heads read the same positions, and none reads what another has drafted."""

    def _take(self, states: Tensor, following: Tensor, mask: Tensor) -> None:
        place = torch.arange(states.shape[1], device=states.device).masked_fill(~mask, -1).max(1).values
        has = place >= 0
        for depth in range(self.mtp.depths):
            h = self._run(depth, states, self._open(depth, states, mask))
            self._close(depth, mask)
            newest = h[torch.arange(len(h), device=h.device), place]
            self.newest[depth] = torch.where(has[:, None], newest, self.newest[depth].to(h.dtype))
            self.known[depth] = self.known[depth] | has

    def _propose(self, k: int, choose: Choose) -> Drafted:
        if k > self.mtp.depths:
            raise VolvelleError(f"drafts: {self.mtp.depths} parallel heads draft at most as many tokens, got {k}")
        logits = [self.head.logits(self.model.model.norm(self.newest[depth])) for depth in range(k)]
        return Drafted(torch.stack([choose(one) for one in logits], 1), torch.stack(logits, 1))


def drafts_of(mtp: MTP, model: Decoder, batch: int, context: int, *, head: DraftHead | None = None) -> Drafts:
    """The drafts of `batch` texts; `context` counts every position observed, and the k - 1 of a draft beside them."""
    match mtp:
        case SequentialMTP():
            return SequentialDrafts(mtp, model, batch, context, head=head)
        case ParallelMTP():
            return ParallelDrafts(mtp, model, batch, context, head=head)
    raise TypeError(f"drafts_of: no way to draft with {type(mtp).__name__}")
