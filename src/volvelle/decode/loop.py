"""The one decoding loop: propose -> step -> accept -> commit -> observe.

A step scores the newest token of every row and, when a drafter proposed some, its draft behind it, in one forward over
the cache. An acceptance rule turns the scores into tokens and says which slots of the step the cache keeps. Without a
drafter nothing is proposed and each step gives one token a row. The prompt is the first step.

Shapes: b rows, k drafted tokens, n = 1 + k tokens a step, v vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from volvelle.decode.request import Request, Token
from volvelle.systems.language.encoder_decoder import Answering, EncoderDecoder

if TYPE_CHECKING:
    from volvelle.parts.attention.cache import Cache
    from volvelle.systems.language.decoder import Decoder
    from volvelle.systems.language.models import LanguageModel


class Draft(NamedTuple):
    """Proposed continuations of the newest token.

    `tokens` is (b, k). `parents` (k,) is each one's parent: an index into `tokens`, -1 for the newest token; None for a
    chain, in which each follows the one before. `q` (b, k, v) holds the probabilities they were drawn with, None when
    they were not drawn but chosen.
    """

    tokens: Tensor
    parents: Sequence[int] | None = None
    q: Tensor | None = None


class Drafter(Protocol):
    """Proposes tokens for the target model to check. `width` is the most tokens it ever proposes in a step."""

    width: int

    def propose(self, requests: Sequence[Request], hidden: Tensor) -> Draft | None:
        """Draft the next tokens of every row, or nothing; hidden (b, width) is the state before the newest token."""
        ...


class Accepted(NamedTuple):
    """What a step gained: new tokens a row (a finished row's are ignored), and which slots of the step stay.

    `path` (b, m) are offsets into the step, -1 = none, or None for all. A row's path holds the newest token (0) and its
    accepted draft tokens; the last of `tokens` comes from the target itself and is not in the step. In a search other
    rows take the place of these: `rows` are those that they go on from, one for each of `tokens`.
    """

    tokens: list[list[int]]
    path: Tensor | None = None
    rows: Sequence[int] | None = None


Acceptance = Callable[[Tensor, "Draft | None", Sequence[Request]], Accepted]


class Event(NamedTuple):
    """Row `row` gained `token`."""

    row: int
    token: Token


def choose_next(logits: Tensor, draft: Draft | None, requests: Sequence[Request]) -> Accepted:
    """The rule for steps without a draft: one token a row from logits (b, n, v) of the last position."""
    last = logits[:, -1]
    if all(request.takes_argmax for request in requests):
        return Accepted([[token] for token in last.argmax(-1).tolist()])
    return Accepted(
        [[] if request.finish else [request.choose(row)] for request, row in zip(requests, last, strict=True)]
    )


def run(
    model: LanguageModel,
    requests: Sequence[Request],
    *,
    drafter: Drafter | None = None,
    accept: Acceptance = choose_next,
    choose: Acceptance = choose_next,
) -> Iterator[list[Event]]:
    """Decode all requests together; yields what each step gained until every row is finished.

    `accept` is the rule for steps with a draft, `choose` for those without.
    """
    longest = max(len(request.prompt) for request in requests)
    lengths = [request.max_tokens for request in requests]
    # Rows that accept less leave holes where others accept more, so with drafts a step may fill slots for one row only.
    room = longest + (max(lengths) if drafter is None else sum(lengths) + drafter.width)
    ids, mask = left_pad([request.prompt for request in requests], model.device)
    draft: Draft | None = None
    with computing(model):
        writer = reader(model, requests)
        cache = writer.new_cache(len(requests), room)
    while True:
        with computing(model):
            hidden, logits = step(writer, cache, ids, mask, 1 if draft is None else 1 + draft.tokens.shape[1])
            rule = choose if draft is None else accept
            accepted = rule(logits, draft, requests)
            cache.commit(accepted.path)
            if accepted.rows is not None:
                cache.reorder(torch.tensor(accepted.rows, device=model.device))
                requests = [requests[row].fork() for row in accepted.rows]
        yield observe(requests, accepted)
        if all(request.finish for request in requests):
            return
        with computing(model):
            ids, mask = torch.tensor([[request.last] for request in requests], device=model.device), None
            draft = None if drafter is None else drafter.propose(requests, last_kept(hidden, accepted))
            if draft is not None:
                ids = torch.cat((ids, draft.tokens), dim=1)
                mask = tree_mask(draft, len(requests))


def reader(model: LanguageModel, requests: Sequence[Request]) -> Decoder | Answering:
    """What writes the answers: a decoder itself, an encoder-decoder once it has read the requests' sources."""
    if not isinstance(model, EncoderDecoder):
        return model
    source, mask = left_pad([request.source or [] for request in requests], model.device)
    return Answering(model, model.read(source, mask=mask, keep=True))


def step(model: Decoder | Answering, cache: Cache, ids: Tensor, mask: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """One forward over `ids`; hidden states (b, n, width) and logits (b, n, v) of the last n tokens."""
    hidden = model.hidden(ids, mask=mask, cache=cache)[:, -n:]
    return hidden, model.logits(hidden)


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


def last_kept(hidden: Tensor, accepted: Accepted) -> Tensor:
    """The hidden state (b, width) from which each row's newest token was chosen."""
    if accepted.path is None:
        return hidden[:, -1]
    last = accepted.path.amax(-1).clamp(min=0)
    return hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)]


def tree_mask(draft: Draft, b: int) -> Tensor | None:
    """The mask (b, n, n) of a step whose draft is a tree, True = may attend; None for a chain, which is causal."""
    if draft.parents is None:
        return None
    n = 1 + len(draft.parents)
    mask = torch.eye(n, dtype=torch.bool, device=draft.tokens.device)
    for node, parent in enumerate(draft.parents, 1):
        mask[node] |= mask[parent + 1]
    return mask.expand(b, n, n)


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


@contextlib.contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Dropout off; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
