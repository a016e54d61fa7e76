"""What the decoding loop keeps of a run with drafts: what the drafter was told, what came of its drafts, and the time.

Shapes: b rows, k drafted tokens, n = 1 + k tokens a step, m tokens kept, v vocabulary.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from volvelle.decode.accept_exact import EXACT
from volvelle.decode.contract import ALWAYS, Acceptance, Accepted, Checked, Draft, Drafted, Drafter, Policy, Seen
from volvelle.decode.near_ties import is_near, known_error, measure_error, scattered_error
from volvelle.decode.request import Request

if TYPE_CHECKING:
    from volvelle.decode.contract import Writer
    from volvelle.parts.attention.cache import Cache
    from volvelle.systems.language.models import LanguageModel

SLACK = 64
"""Slots of the cache that holes may take besides a quarter of the longest text, before texts are moved together."""


class Help(NamedTuple):
    """What drafts, which of its tokens stay, and how many are asked for.

    `straight`, where steps take no trees, is the most tokens of a step: of a draft only the first path is checked.
    """

    drafter: Drafter
    accept: Acceptance = EXACT
    policy: Policy = ALWAYS
    straight: int | None = None


class Told(NamedTuple):
    """A step as its rule judged it, before the requests took its tokens: their numbers, -1 for finished ones.

    `near` says of each row's new tokens whether the choice was a near tie; empty where nobody counts.
    """

    accepted: Accepted
    draft: Draft | None
    written: list[int]
    near: list[list[bool]]


class Speculation:
    """The state of one run: the drafter's, the policy's, and what neither has been told yet."""

    def __init__(
        self,
        model: LanguageModel,
        writer: Writer,
        requests: Sequence[Request],
        help: Help,
        forward: Callable[..., tuple[Tensor, Tensor]],
        room: int,
    ):
        self.model, self.writer, self.forward = model, writer, forward
        self.accept, self.straight = help.accept, help.straight
        self.drafting, self.pacing = help.drafter.begin(writer, requests, room), help.policy.begin()
        # Rows that accept less leave holes where others accept more.
        self.spare = 1 + self.drafting.width + (slack(room) if len(requests) > 1 else 0)
        self._seen: list[Seen] = []
        self._started: float | None = None  # when the step began, None for the prompt's
        self._draft_seconds = 0.0
        self._length = 0
        # One way of computing steps may be an object a run.
        self._kind = self.model.dtype, getattr(forward, "__name__", type(forward).__name__)
        self._error = known_error(model, self._kind)
        self._share = 0.0  # of a logit that is uncertain besides, once a path was kept whose slots had gaps
        self._alone: Tensor | None = None  # logits of the newest tokens, run without the first draft
        self._rows = len(requests)
        self._newest: Told | None = None
        for request in requests:
            request.near_ties = 0 if request.sampling.greedy else None

    def propose(self, cache: Cache, requests: Sequence[Request]) -> Draft | None:
        """Ask the policy how many tokens to draft, and the drafter for them."""
        begun = time.perf_counter()
        self._length = cache.length
        live = [row for row, request in enumerate(requests) if request.finish is None]
        # A step gives one token besides those of the draft; none may stand behind the end of the context.
        deepest = max(requests[row].left for row in live) - 1
        deepest = min(deepest, *(self.model.room - requests[row].length for row in live))
        drafting, draft = self.drafting, None
        limit = drafting.width if deepest > 0 else 0
        if drafting.depth == drafting.width:
            limit = min(limit, deepest)
        if self.straight is not None and self.straight < 2:
            limit = 0  # steps of one token have no room for drafts
        choose = self.pacing.choose
        if drafting.states:
            drafting.unstated = functools.partial(choose, length=self._length)
            choose = self.pacing.choose_stated
        asked = choose(limit, self._length)
        if asked > 0:
            seen, self._seen = together(self._seen, requests), []
            draft = drafting.propose(requests, seen, asked)
        if draft is not None:
            if draft.tokens.shape[1] > asked:
                raise ValueError(f"a drafter was asked for {asked} tokens and gave {draft.tokens.shape[1]}")
            if self.straight is not None:
                draft = first_path(draft, self.straight - 1)
            draft = cut(draft, deepest)
            if draft.chances:
                draft = draft.only(range(self.pacing.worth(draft.chances, self._length)))
            draft = shortened(draft, {row: requests[row].left - 1 for row in live})
        self._draft_seconds = time.perf_counter() - begun
        if draft is not None and self._error is None and any(requests[row].sampling.greedy for row in live):
            self._alone = self._newest_alone(cache, requests)
        self._started = time.perf_counter()
        return draft

    def scored(self, logits: Tensor, accepted: Accepted, draft: Draft | None, requests: Sequence[Request]) -> Told:
        """Note a step before the requests take its tokens."""
        written = [len(request.tokens) if request.finish is None else -1 for request in requests]
        if self._alone is not None:
            live = [row for row, before in enumerate(written) if before >= 0]
            self._error = measure_error(self.model, self._kind, self._alone[live], logits[live, 0])
            self._alone = None
        if draft is not None and draft.parents is not None and not self._share and scattered(accepted):
            self._share = scattered_error(logits.dtype)
        # Where steps of all widths give the same bits there is nothing that rounding could turn.
        near = self._near(logits, accepted, requests) if self._error or self._share else []
        return Told(accepted, draft, written, near)

    def gained(self, told: Told, cache: Cache, requests: Sequence[Request], step: Seen) -> None:
        """Note what the requests gained; `step` holds all of its tokens."""
        draft, written, self._newest = told.draft, told.written, told
        running = [row for row, before in enumerate(written) if before >= 0]
        depths = None if draft is None else reach(draft)
        for row in running:
            request, before = requests[row], written[row]
            if depths is not None:
                request.count(depths[row], sum(request.drafted[before:]))
            if told.near and request.near_ties is not None:
                request.near_ties += sum(told.near[row][: len(request.tokens) - before])
        self._seen.append(kept_of(step, told.accepted.path, [request.finish is None for request in requests]))
        self.drafting.observe(requests, told.accepted, draft)
        if self._started is not None:
            seconds, checked = time.perf_counter() - self._started, None
            if draft is not None:
                nodes = told.accepted.nodes
                kept = [nodes[row] for row in running]
                checked = Drafted(draft.tokens.shape[1], draft.parents, kept, draft.chances)
            self.pacing.observe(self._length, checked, step_seconds=seconds, draft_seconds=self._draft_seconds)
        self._tidy(cache, requests, running)

    def checked(self, row: int) -> Checked | None:
        """What became of this row's draft in the newest step; None where it had none."""
        if self._newest is None or self._newest.draft is None or self._newest.written[row] < 0:
            return None
        kept = set(self._newest.accepted.nodes[row])
        nodes = [(token, node in kept) for node, token in enumerate(self._newest.draft.tokens[row].tolist())]
        real = [pair for pair in nodes if pair[0] >= 0]
        return Checked([token for token, _ in real], [stays for _, stays in real]) if real else None

    def join(self, row: int, request: Request, prompt: Seen) -> None:
        """Another text takes the place of row `row`, which had finished; `prompt` holds all of it, as one row."""
        request.near_ties = 0 if request.sampling.greedy else None
        self.drafting.join(row, request)
        others = [emptied(seen, row) for seen in self._seen]
        ids, hidden = (x.expand(self._rows, *x.shape[1:]) for x in (prompt.ids, prompt.hidden))
        there = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
        there[row] = True
        self._seen = [*others, Seen(ids, hidden, there)]

    def _newest_alone(self, cache: Cache, requests: Sequence[Request]) -> Tensor:
        """Logits (b, v) of the newest tokens as a plain step gives them; it stays open, the next one overwrites it."""
        ids = torch.tensor([[request.last] for request in requests], device=self.model.device)
        logits, _ = self.forward(self.writer, cache, ids, None, 1, self.drafting.read)
        return logits[:, -1]

    def _near(self, logits: Tensor, accepted: Accepted, requests: Sequence[Request]) -> list[list[bool]]:
        """Of each greedy row, whether its choices were near ties."""
        path = None if accepted.path is None else accepted.path.tolist()
        found: list[list[bool]] = [[] for _ in requests]
        for row, request in enumerate(requests):
            if request.finish is not None or not request.sampling.greedy:
                continue
            tokens = accepted.tokens[row]
            scores = logits[row, -1:] if path is None else logits[row, path[row][: len(tokens)]]
            if not request.all_argmax(len(tokens)):
                scores = torch.stack([request.scores(one, tokens[:place]) for place, one in enumerate(scores)])
            found[row] = is_near(scores, self._error or 0.0, self._share).tolist()
        return found

    def _tidy(self, cache: Cache, requests: Sequence[Request], running: Sequence[int]) -> None:
        """Free the slots of rows that have just finished, and move the others together where holes are many."""
        finished = [row for row in running if requests[row].finish is not None]
        live = [request.length for request in requests if request.finish is None]
        if not live:
            return
        if finished:
            cache.forget(torch.tensor(finished, device=self.model.device))
        if cache.length > self.model.ahead + max(live) + slack(max(live)):
            cache.compact()


def scattered(accepted: Accepted) -> bool:
    """Whether some row keeps a path of a tree that had other branches between its tokens."""
    return any(nodes and nodes[-1] != len(nodes) - 1 for nodes in accepted.nodes)


def slack(length: int) -> int:
    """Slots that holes may take beside the longest text of `length` tokens."""
    return max(SLACK, length // 4)


def kept_of(step: Seen, path: Tensor | None, live: Sequence[bool]) -> Seen:
    """The tokens of a step that lie on `path` (b, m), None = all, in the rows that are `live`."""
    ids, hidden, mask = step
    if path is not None:
        path = path.to(ids.device)
        at = path.clamp(min=0)
        ids, hidden = ids.gather(1, at), hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
        mask = None if bool((path >= 0).all()) else path >= 0
    if not all(live):
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        mask = mask & torch.tensor(live, device=ids.device)[:, None]
    return Seen(ids, hidden, mask)


def emptied(seen: Seen, row: int) -> Seen:
    """The same without the tokens of this row."""
    mask = torch.ones_like(seen.ids, dtype=torch.bool) if seen.mask is None else seen.mask.clone()
    mask[row] = False
    return seen._replace(mask=mask)


def together(seen: Sequence[Seen], requests: Sequence[Request]) -> Seen:
    """What several steps gave, as one. Of rows that have finished since, nothing is left to be observed."""
    if len(seen) == 1:
        return seen[0]
    mask = None
    if any(part.mask is not None for part in seen):
        whole = [torch.ones_like(part.ids, dtype=torch.bool) if part.mask is None else part.mask for part in seen]
        mask = torch.cat(whole, 1)
        mask &= torch.tensor([request.finish is None for request in requests], device=mask.device)[:, None]
    return Seen(torch.cat([part.ids for part in seen], 1), torch.cat([part.hidden for part in seen], 1), mask)


def cut(draft: Draft, depth: int) -> Draft:
    """The draft without tokens more than `depth` places behind the newest one."""
    places = depths_of(draft.ancestry)
    return draft.only([node for node, place in enumerate(places) if place <= depth])


def first_path(draft: Draft, depth: int) -> Draft:
    """Of a tree the path that takes the first child everywhere, of a chain all, up to `depth` tokens; as a chain."""
    path: list[int] = []
    for node, parent in enumerate(draft.ancestry):
        if parent == (path[-1] if path else -1) and len(path) < depth:
            path.append(node)
    return draft.only(path)._replace(parents=None)


def shortened(draft: Draft, most: dict[int, int]) -> Draft | None:
    """The draft without the tokens that a row could not take any more; None where none is left in the rows of `most`.

    So a row's random numbers do not depend on how much the others may still write.
    """
    places = depths_of(draft.ancestry)
    if min(most.values()) < max(places, default=0):
        over = torch.tensor([[place > most.get(row, place) for place in places] for row in range(len(draft.tokens))])
        draft = draft._replace(tokens=draft.tokens.masked_fill(over.to(draft.tokens.device), -1))
    rows = draft.tokens.tolist()
    return draft if any(token >= 0 for row in most for token in rows[row]) else None


def reach(draft: Draft) -> list[int]:
    """Of each row the places behind the newest token that its draft reaches."""
    places = depths_of(draft.ancestry)
    rows = draft.tokens.tolist()
    return [max((place for place, token in zip(places, row, strict=True) if token >= 0), default=0) for row in rows]


@functools.lru_cache(maxsize=256)
def depths_of(parents: tuple[int, ...]) -> tuple[int, ...]:
    """Of each node of a tree its place behind the newest token.

    >>> depths_of((-1, -1, 0, 2))
    (1, 1, 2, 3)
    """
    found: list[int] = []
    for parent in parents:
        found.append(1 if parent < 0 else 1 + found[parent])
    return tuple(found)
