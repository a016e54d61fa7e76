"""The one decoding loop: propose -> step -> accept -> commit -> observe.

A step scores the newest token of every row and, when a drafter proposed some, its draft behind it, in one forward over
the cache. An acceptance rule turns the scores into tokens and says which slots of the step the cache keeps. Without a
drafter nothing is proposed and each step gives one token a row. The prompt is the first step.

Shapes: b rows, k drafted tokens, n = 1 + k tokens a step, v vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from volvelle.decode.contract import Accepted, Draft, Drafter, Drafting, Rule, Seen
from volvelle.decode.request import Request, Token, distributions
from volvelle.decode.sampling import draw_rows, likeliest
from volvelle.decode.speculation import Help, Speculation
from volvelle.systems.language.encoder_decoder import Answering, EncoderDecoder

if TYPE_CHECKING:
    from volvelle.decode.contract import Writer
    from volvelle.parts.attention.cache import Cache
    from volvelle.systems.language.models import LanguageModel

__all__ = ["Accepted", "Draft", "Drafter", "Drafting", "Event", "Help", "Seen", "begin", "choose_next", "step"]

Read = Callable[["Writer", Tensor, "Tensor | None", "Cache"], tuple[Tensor, Tensor]]
"""Runs the writer over a step's ids (b, n) with their mask: the final states, and those that a drafter sees."""

Forward = Callable[["Writer", "Cache", Tensor, "Tensor | None", int, Read], tuple[Tensor, Tensor]]
"""How a step is computed; see `step`."""


class Event(NamedTuple):
    """Row `row` gained `token`."""

    row: int
    token: Token


def choose_next(logits: Tensor, draft: Draft | None, requests: Sequence[Request]) -> Accepted:
    """The rule for steps without a draft: one token a row from logits (b, n, v) of the last position."""
    last = logits[:, -1]
    live = [row for row, request in enumerate(requests) if request.finish is None]
    if all(request.takes_argmax for request in requests):
        return Accepted([[token] for token in likeliest(last, live)])
    if len(live) == 1:
        chosen = [requests[live[0]].choose(last[live[0]])]
    else:
        chosen = choose_rows(last[live], [requests[row] for row in live])
    tokens: list[list[int]] = [[] for _ in requests]
    for row, token in zip(live, chosen, strict=True):
        tokens[row] = [token]
    return Accepted(tokens)


def choose_rows(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """The next token of every request from its row of logits (r, v), as `Request.choose` chooses it, all at once."""
    p = distributions(requests, logits, [()] * len(requests))
    uniform = torch.tensor([request.uniform() for request in requests], dtype=torch.float64)
    return draw_rows(p, uniform).tolist()


class Decoding:
    """Rows that are decoded together, one `step` after the other; `requests` are the rows.

    Without drafts the rule is `choose`, with them that of `drafts`. `forward` computes a step (default: `step`). The
    first step is that of the prompts, unless the `cache` holds the texts already and they are `read`.
    """

    def __init__(
        self,
        writer: Writer,
        requests: Sequence[Request],
        cache: Cache,
        *,
        choose: Rule = choose_next,
        drafts: Speculation | None = None,
        forward: Forward | None = None,
        read: bool = False,
    ):
        self.writer, self.requests, self.cache, self.drafts = writer, list(requests), cache, drafts
        self.model: LanguageModel = writer.model if isinstance(writer, Answering) else writer
        self.choose, self.forward = choose, forward or step
        self.read: Read = read_once if drafts is None else drafts.drafting.read
        self._has_read = read

    @property
    def finished(self) -> bool:
        """Whether all rows are."""
        return all(request.finish for request in self.requests)

    def __iter__(self) -> Iterator[list[Event]]:
        """What each step gains, until every row is finished."""
        while not self.finished:
            yield self.step()

    def step(self) -> list[Event]:
        """Propose, score, accept, commit, observe: what the rows gained. At least one must be unfinished."""
        with computing(self.model):
            draft, ids, mask, n = self._ask()
            logits, states = self.forward(self.writer, self.cache, ids, mask, n, self.read)
            if self.drafts is None or draft is None:
                accepted = self.choose(logits, draft, self.requests)
            else:
                accepted = self.drafts.accept(logits, draft, self.requests)
            note_logprobs(logits, accepted, self.requests)
            self.cache.commit(accepted.path)
            if accepted.rows is not None:
                self.cache.reorder(torch.tensor(accepted.rows, device=self.model.device))
                self.requests = [self.requests[row].fork() for row in accepted.rows]
            if self.drafts is None:
                return observe(self.requests, accepted)
            told = self.drafts.scored(logits, accepted, draft, self.requests)
            events = observe(self.requests, accepted)
            self.drafts.gained(told, self.cache, self.requests, Seen(ids, states, mask))
            return events

    def _ask(self) -> tuple[Draft | None, Tensor, Tensor | None, int]:
        """The draft, the step's tokens (b, n) with their mask, and how many of them at the end are scored."""
        if not self._has_read:
            self._has_read = True
            ids, mask = left_pad([request.prompt for request in self.requests], self.model.device)
            return None, ids, mask, 1
        draft = None
        if self.drafts is not None:
            draft = self.drafts.propose(self.cache, self.requests)
        elif any(request.finish for request in self.requests):
            forget_overfull(self.cache, self.model, self.requests)
        ids = torch.tensor([[request.last] for request in self.requests], device=self.model.device)
        if draft is None:
            return None, ids, None, 1
        ids = torch.cat((ids, draft.tokens.clamp(min=0)), dim=1)
        return draft, ids, tree_mask(draft, len(self.requests)), ids.shape[1]


def begin(
    model: LanguageModel,
    requests: Sequence[Request],
    *,
    choose: Rule = choose_next,
    help: Help | None = None,
    forward: Forward | None = None,
    spare: int = 0,
) -> Decoding:
    """Make ready to decode all requests together, from their prompts on.

    `choose` is the rule for steps without a draft; `help` makes drafts and has a rule for steps with one. `forward`
    computes a step (default: `step`) and may touch `spare` slots of the cache behind the step's own.
    """
    room = max(len(request.prompt) for request in requests) + max(request.max_tokens for request in requests)
    drafts: Speculation | None = None
    with computing(model):
        writer = reader(model, requests)
        if help is not None:
            drafts = Speculation(model, writer, requests, help, forward or step, room)
            spare += drafts.spare
        cache = writer.new_cache(len(requests), room + spare)
    return Decoding(writer, requests, cache, choose=choose, drafts=drafts, forward=forward)


def reader(model: LanguageModel, requests: Sequence[Request]) -> Writer:
    """What writes the answers: a decoder itself, an encoder-decoder once it has read the requests' sources."""
    if not isinstance(model, EncoderDecoder):
        return model
    source, mask = left_pad([request.source or [] for request in requests], model.device)
    return Answering(model, model.read(source, mask=mask, keep=True))


def read_once(writer: Writer, ids: Tensor, mask: Tensor | None, cache: Cache) -> tuple[Tensor, Tensor]:
    """`Drafting.read` where nothing drafts."""
    hidden = writer.hidden(ids, mask=mask, cache=cache)
    return hidden, hidden


def step(
    writer: Writer, cache: Cache, ids: Tensor, mask: Tensor | None, n: int, read: Read = read_once
) -> tuple[Tensor, Tensor]:
    """One forward over `ids`: logits (b, n, v) of the last n tokens, and the states of all that a drafter sees."""
    hidden, states = read(writer, ids, mask, cache)
    return writer.logits(hidden[:, -n:]), states


def observe(requests: Sequence[Request], accepted: Accepted) -> list[Event]:
    """Give every unfinished row its new tokens, up to the one that finishes it."""
    events = []
    for row, (request, tokens) in enumerate(zip(requests, accepted.tokens, strict=True)):
        if request.finish is None:
            request.steps += 1
        for number, token in enumerate(tokens):
            if request.finish is not None:
                break
            events.append(Event(row, request.add(token, drafted=number < len(tokens) - 1)))
    return events


def note_logprobs(logits: Tensor, accepted: Accepted, requests: Sequence[Request]) -> None:
    """Tell the requests that want to know how likely their new tokens were; logits (b, n, v)."""
    for row, request in enumerate(requests):
        if request.logprobs is not None and request.finish is None:
            tokens = accepted.tokens[row]
            request.note(logits[row, -1:] if accepted.path is None else logits[row, accepted.path[row]], tokens)


def forget_overfull(cache: Cache, model: LanguageModel, requests: Sequence[Request]) -> None:
    """Forget finished rows whose next position would leave the model's context; the others go on."""
    steps = max(request.steps for request in requests)
    full = [i for i, r in enumerate(requests) if r.finish and len(r.prompt) + steps == model.room + 1]
    if full:
        cache.forget(torch.tensor(full, device=model.device))


def tree_mask(draft: Draft, b: int) -> Tensor | None:
    """The mask (b, n, n) of a step whose draft is a tree, True = may attend; None for a chain, which is causal."""
    if draft.parents is None:
        return None
    mask = _ancestors(tuple(draft.parents)).to(draft.tokens.device)
    return mask.expand(b, *mask.shape)


@functools.lru_cache(maxsize=256)
def _ancestors(parents: tuple[int, ...]) -> Tensor:
    """Of each token of a step, the newest one first, which are on its path (n, n)."""
    rows = [[True] + [False] * len(parents)]
    for node, parent in enumerate(parents, 1):
        row = list(rows[parent + 1])
        row[node] = True
        rows.append(row)
    return torch.tensor(rows)


def left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts as ids (b, longest), padded on the left, and the mask of real tokens (None when nothing is padded)."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    if all(len(prompt) == longest for prompt in prompts):
        return ids, None
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    return ids, torch.arange(longest, device=device) >= longest - lengths


@contextlib.contextmanager
def computing(model: LanguageModel) -> Iterator[None]:
    """No gradients, and the model's own dtype: keys and values in the cache do not follow a caller's autocast."""
    with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
        yield
