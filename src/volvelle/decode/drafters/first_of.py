"""Several drafters as one: the first that has a draft makes it.

Lookup costs nothing and is nearly always right where a text repeats, but most places do not; a trained drafter has
something to say everywhere, at a price. `FirstOf(PromptLookup(least=3), mtp)` drafts with both.

Shapes: b rows, k drafted tokens, m positions seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from volvelle.decode.contract import Accepted, Draft, Drafter, Drafting, Seen
from volvelle.decode.speculation import emptied, together
from volvelle.errors import UsageError

if TYPE_CHECKING:
    from volvelle.decode.contract import Writer
    from volvelle.decode.request import Request
    from volvelle.parts.attention.cache import Cache


class FirstOf(Drafter):
    """Draft with the first of `drafters` that has a draft for any row; the others see what they were not asked about.

    At most one of them may read the target in a way of its own (modules of multi-token prediction). Raises UsageError
    for none.

    >>> from volvelle.decode.drafters.prompt_lookup import PromptLookup
    >>> len(FirstOf(PromptLookup(n=5, least=3), PromptLookup(n=2)).drafters)
    2
    """

    def __init__(self, *drafters: Drafter):
        if not drafters:
            raise UsageError("first of: wants at least one drafter")
        self.drafters = drafters

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The networks of all."""
        return [module for drafter in self.drafters for module in drafter.modules]

    @property
    def draws(self) -> bool:
        """Whether any of them does."""
        return any(drafter.draws for drafter in self.drafters)

    def begin(self, writer: Writer, requests: Sequence[Request], room: int) -> FirstOfDrafting:
        """Make all ready; raises what any of them raises, and UsageError where two read the target differently."""
        return FirstOfDrafting([drafter.begin(writer, requests, room) for drafter in self.drafters])


class FirstOfDrafting(Drafting):
    """The drafters in one run, what each has not been told yet, and which of them made the last draft."""

    def __init__(self, parts: Sequence[Drafting]):
        own = [part for part in parts if type(part).read is not Drafting.read]
        if len(own) > 1:
            raise UsageError(f"first of: {len(own)} drafters read the target in ways of their own, one can")
        self.parts, self.reader = parts, own[0] if own else parts[0]
        self.width = max(part.width for part in parts)
        self.states = any(part.states for part in parts)
        self.untold: list[list[Seen]] = [[] for _ in parts]
        self.drafted: Drafting | None = None

    @property
    def depth(self) -> int:
        """The most tokens on one path."""
        return max(part.depth for part in self.parts)

    def read(self, writer: Writer, ids: Tensor, mask: Tensor | None, cache: Cache) -> tuple[Tensor, Tensor]:
        """As the one that has a way of its own reads."""
        return self.reader.read(writer, ids, mask, cache)

    def propose(self, requests: Sequence[Request], seen: Seen, k: int) -> Draft | None:
        """Ask one after the other; where the policy judges some by their chances, the others for what it allows."""
        for untold in self.untold:
            untold.append(seen)
        for part, untold in zip(self.parts, self.untold, strict=True):
            most = k if part.states or not self.states or self.unstated is None else self.unstated(k)
            if most < 1:
                continue
            draft = part.propose(requests, together(untold, requests), min(most, part.width))
            untold.clear()
            self.drafted = part if draft is not None else None
            if draft is not None:
                return draft
        return None

    def join(self, row: int, request: Request) -> None:
        """Tell all; what they were not told of the text before goes with it."""
        for part in self.parts:
            part.join(row, request)
        self.untold = [[emptied(seen, row) for seen in untold] for untold in self.untold]

    def observe(self, requests: Sequence[Request], accepted: Accepted, draft: Draft | None) -> None:
        """Tell the one that drafted what came of it, the others that there was a step."""
        for part in self.parts:
            part.observe(requests, accepted, draft if part is self.drafted else None)
