"""Drafting with modules of multi-token prediction, token by token, each given those before it (or side by side).

The modules read the texts behind the model, in caches of their own; systems/language/mtp_drafts.py is how.

Shapes: b rows, k drafted tokens, m positions seen, v vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from volvelle.decode.contract import Draft, Drafter, Drafting, Seen
from volvelle.decode.drafters.fit import check_fit
from volvelle.decode.request import distributions
from volvelle.decode.sampling import guess_rows
from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.draft_head import DraftHead, DraftHeads
from volvelle.systems.language.mtp import MTP as Modules
from volvelle.systems.language.mtp import ParallelMTP
from volvelle.systems.language.mtp_drafts import drafts_of

if TYPE_CHECKING:
    from volvelle.decode.contract import Writer
    from volvelle.decode.request import Request
    from volvelle.parts.attention.cache import Cache


SLACK = 64
"""Positions that holes may take, where rows grow unevenly, before they are closed."""


@dataclass(frozen=True)
class MTP(Drafter):
    """Draft chains of up to `k` tokens with `mtp`, modules that belong to the model (`read_mtp`).

    Sequential modules draft on with their last one; parallel ones draft at most as many tokens as they are.
    """

    mtp: Modules = field(repr=False)
    k: int = 3

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UsageError(f"mtp: k must be at least 1, got {self.k}")
        if isinstance(self.mtp, ParallelMTP) and self.k > self.mtp.depths:
            raise UsageError(f"mtp: {self.mtp.depths} parallel modules draft at most as many tokens, got k={self.k}")

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The modules."""
        return (self.mtp,)

    @property
    def draws(self) -> bool:
        """True: as each request does."""
        return True

    def begin(self, writer: Writer, requests: Sequence[Request], room: int) -> MTPDrafting:
        """Allocate the modules' caches; raises VolvelleError where the modules do not fit the model."""
        model = check_fit("mtp: the modules", self.mtp, writer, self.mtp.width)
        if model.before is not None:
            raise VolvelleError("mtp: the modules do not know the prefix that comes before this model's texts")
        return MTPDrafting(self, model, len(requests), room)

    @functools.cached_property
    def projections(self) -> DraftHeads:
        """The models' projections onto the tokens that are drafted."""
        return DraftHeads(self.mtp.tokens)


class MTPDrafting(Drafting):
    """The modules in one run."""

    def __init__(self, options: MTP, model: Decoder, rows: int, room: int):
        self.width, self.mtp = options.k, options.mtp
        self.head = options.projections.of(model)
        self.drafts = drafts_of(options.mtp, model, rows, room + options.k + SLACK, head=self.head)

    def read(self, writer: Writer, ids: Tensor, mask: Tensor | None, cache: Cache) -> tuple[Tensor, Tensor]:
        """The final states, and what the modules read."""
        assert isinstance(writer, Decoder)
        return self.mtp.read(writer, ids, mask=mask, cache=cache)

    def propose(self, requests: Sequence[Request], seen: Seen, k: int) -> Draft | None:
        """Draft a chain of up to k tokens for every row."""
        newest = torch.tensor([request.last for request in requests], device=seen.ids.device)
        self.drafts.observe(seen.hidden, following(seen.ids, newest, seen.mask), seen.mask)
        k = min(k, self.width)
        if k < 1:
            return None
        live = torch.tensor([request.finish is None for request in requests], device=seen.ids.device)
        if all(request.all_argmax(k) for request in requests):
            return Draft(self.drafts.draft(k, rows=live).tokens)
        draws = _Draws(requests, self.head)
        tokens = self.drafts.draft(k, draws, rows=live).tokens
        return Draft(tokens, q=None if all(r.sampling.greedy for r in requests) else torch.stack(draws.q, 1))

    def join(self, row: int, request: Request) -> None:
        """The text before it is forgotten; what was not observed of it yet is not told any more."""
        self.drafts.forget(row)


class _Draws:
    """Chooses each token of a draft by the requests' own rules, given those before it; `q` are the distributions."""

    def __init__(self, requests: Sequence[Request], head: DraftHead):
        self.requests, self.head = requests, head
        self.q: list[Tensor] = []
        self.drafted: list[list[int]] = [[] for _ in requests]

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (b, r) to tokens (b,)."""
        q = distributions(self.requests, self.head.widened(logits), self.drafted)
        # A row takes numbers only for tokens it may still write: they do not depend on the other rows.
        place = len(self.q)
        numbers = [r.uniform() if r.finish is None and place < r.left - 1 else 0.5 for r in self.requests]
        tokens = guess_rows(q, torch.tensor(numbers, dtype=torch.float64, device=q.device))
        for row, token in zip(self.drafted, tokens.tolist(), strict=True):
            row.append(token)
        self.q.append(q)
        return tokens


def following(ids: Tensor, newest: Tensor, mask: Tensor | None) -> Tensor:
    """The token behind each of ids (b, m): the next real one of its row, `newest` (b,) behind the last.

    >>> ids, mask = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[True, False, True, False]])
    >>> following(ids, torch.tensor([9]), None), following(ids, torch.tensor([9]), mask)
    (tensor([[2, 3, 4, 9]]), tensor([[3, 3, 9, 9]]))
    """
    b, m = ids.shape
    behind = torch.cat((ids, newest[:, None]), 1)
    place = torch.arange(m + 1, device=ids.device).expand(b, m + 1)
    if mask is not None:
        real = torch.cat((mask, mask.new_ones(b, 1)), 1)
        place = place.masked_fill(~real, m).flip(1).cummin(1).values.flip(1)
    return behind.gather(1, place[:, 1:])
