"""Text from a language model: `generate` for one prompt, `generate_batch` for several, `stream` token by token."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor, nn

from volvelle.decode.accept_exact import EXACT
from volvelle.decode.bitwise import bitwise
from volvelle.decode.contract import Acceptance, Drafter, Policy
from volvelle.decode.loop import Decoding, Event, Help, begin
from volvelle.decode.options import Rules, Sampling
from volvelle.decode.policy import usual_policy
from volvelle.decode.request import NO_RULES, Generation, Limits, Request, Token
from volvelle.decode.stop import StopText
from volvelle.errors import UsageError
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.projections import fuse_projections
from volvelle.systems.modes import evaluating

if TYPE_CHECKING:
    from volvelle.systems.language.models import LanguageModel

GREEDY = Sampling()
Exactness = Literal["default", "bitwise"]


def generate(
    model: LanguageModel,
    prompt_ids: Sequence[int] | Tensor,
    *,
    sampling: Sampling = GREEDY,
    max_tokens: int | None = 256,
    stop: Sequence[str] = (),
    eos_ids: Sequence[int] | int | None = None,
    rules: Rules = NO_RULES,
    drafter: Drafter | None = None,
    acceptance: Acceptance = EXACT,
    policy: Policy | None = None,
    exact: Exactness = "default",
    logprobs: int | None = None,
    on_token: Callable[[Token], object] | None = None,
) -> Generation:
    """Continue one prompt; an encoder-decoder reads it and writes an answer to it.

    The answer ends at an eos id (one or several; default: the tokenizer's; `()` = none), before a stop string, or after
    `max_tokens` (None: when the context is full). `rules` say what else it must and must not hold. `on_token` is called
    with every Token as it comes. Computes in the model's own dtype, without gradients and dropout.

    A `drafter` proposes tokens that the model checks several at a time; `acceptance` says which stay (by default
    those that leave the answer what it is without drafts), `policy` how many are worth proposing (by default an
    `Adaptive` one of its own; `ALWAYS` where there is a seed and drafts are drawn). `exact` = "bitwise" computes all
    steps alike, so that not even rounding tells an answer with drafts from one without (decode/bitwise.py).
    `logprobs` = m notes how likely the model found each token, and its m likeliest ones there.

    Raises VolvelleError when the prompt is empty, when the prompt and `max_tokens` do not fit into the context (nothing
    is cut silently), when the drafter does not fit the model, and when logits are no numbers or rules ban every token.
    """
    request = Request(model, prompt_ids, sampling, limits(max_tokens, stop, eos_ids, rules, logprobs))
    events = _events(model, [request], _help(drafter, acceptance, policy, [request]), exact)
    [answer] = _listened(events, on_token and (lambda _, token: on_token(token)))
    return answer


def stream(
    model: LanguageModel,
    prompt_ids: Sequence[int] | Tensor,
    *,
    sampling: Sampling = GREEDY,
    max_tokens: int | None = 256,
    stop: Sequence[str] = (),
    eos_ids: Sequence[int] | int | None = None,
    rules: Rules = NO_RULES,
    drafter: Drafter | None = None,
    acceptance: Acceptance = EXACT,
    policy: Policy | None = None,
    exact: Exactness = "default",
    logprobs: int | None = None,
) -> Generator[Token, None, Generation]:
    """Continue one prompt as an iterator of Tokens, whose texts join to the answer's; it returns the Generation.

    The arguments are those of `generate`, and are checked at once, before the first token is asked for. A part of a
    stop string or of a UTF-8 character is never in a Token's text.
    """
    request = Request(model, prompt_ids, sampling, limits(max_tokens, stop, eos_ids, rules, logprobs))
    events = _events(model, [request], _help(drafter, acceptance, policy, [request]), exact)

    def tokens() -> Generator[Token, None, Generation]:
        while True:
            try:
                yield next(events).token
            except StopIteration as end:
                return end.value[0]

    return tokens()


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int] | Tensor],
    *,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    max_tokens: int | None = 256,
    stop: Sequence[str] = (),
    eos_ids: Sequence[int] | int | None = None,
    rules: Rules = NO_RULES,
    drafter: Drafter | None = None,
    acceptance: Acceptance = EXACT,
    policy: Policy | None = None,
    exact: Exactness = "default",
    logprobs: int | None = None,
    on_token: Callable[[int, Token], object] | None = None,
) -> list[Generation]:
    """Continue several prompts in one batch, padded on the left; rows finish when they finish.

    `sampling` is one for all, or one a prompt. One with a seed s gives row i the seed s + i, so that equal prompts get
    different answers; each is the answer `generate` gives for that seed alone, up to the rounding differences between
    batch sizes. `on_token` is called with the row and the Token.
    """
    if isinstance(sampling, Sampling):
        sampling = [_for_row(sampling, row) for row in range(len(prompts))]
    if len(sampling) != len(prompts):
        raise UsageError(f"generate_batch: {len(prompts)} prompts, but {len(sampling)} samplings")
    if not prompts:
        return []
    ends = limits(max_tokens, stop, eos_ids, rules, logprobs)
    requests = [Request(model, prompt, options, ends) for prompt, options in zip(prompts, sampling, strict=True)]
    return _listened(_events(model, requests, _help(drafter, acceptance, policy, requests), exact), on_token)


def _listened(
    events: Generator[Event, None, list[Generation]], on_token: Callable[[int, Token], object] | None
) -> list[Generation]:
    """Decode to the end, and tell every token to who listens."""
    while True:
        try:
            row, token = next(events)
        except StopIteration as end:
            return end.value
        if on_token is not None:
            on_token(row, token)


def _help(
    drafter: Drafter | None, acceptance: Acceptance, policy: Policy | None, requests: Sequence[Request]
) -> Help | None:
    if drafter is None:
        return None
    return Help(drafter, acceptance, policy or usual_policy(drafter, [request.sampling for request in requests]))


def _events(
    model: LanguageModel, requests: list[Request], help: Help | None, exact: Exactness
) -> Generator[Event, None, list[Generation]]:
    """What the requests gain, as it comes. What cannot be is said at once, before the first event is asked for."""
    if exact not in get_args(Exactness):
        raise UsageError(f"exact must be one of {', '.join(get_args(Exactness))}, got {exact!r}")
    started = time.perf_counter()
    models = (model, *(() if help is None else help.drafter.modules))
    with evaluating(*models):
        for one in models:
            if isinstance(one, Decoder):
                fuse_projections(one)
        forward, spare = None, 0
        if exact == "bitwise":
            forward, spare = bitwise(model, requests)
            help = None if help is None else help._replace(straight=forward.most)
        decoding = begin(model, requests, help=help, forward=forward, spare=spare)
    whole = [help is None or help.accept.lossless(request.sampling) for request in requests]
    return _decoded(decoding, requests, models, whole, time.perf_counter() - started)


def _decoded(
    decoding: Decoding, requests: list[Request], models: Sequence[nn.Module], whole: list[bool], before: float
) -> Generator[Event, None, list[Generation]]:
    """Decode to the end; to begin took `before` seconds."""
    started, ends, first = time.perf_counter() - before, [0.0] * len(requests), 0.0
    with evaluating(*models):
        for events in decoding:
            now = time.perf_counter() - started
            first = first or now
            for event in events:
                ends[event.row] = now
            yield from events
    return [finished(*answer, prompt_seconds=first) for answer in zip(requests, ends, whole, strict=True)]


def finished(request: Request, seconds: float, lossless: bool = True, *, prompt_seconds: float) -> Generation:
    """The request as a finished answer."""
    return Generation(
        tokens=request.tokens,
        text=request.text,
        finish=request.finish or "length",
        prompt_tokens=len(request.source or request.prompt),
        steps=request.steps,
        seconds=seconds,
        prompt_seconds=prompt_seconds,
        drafted=request.drafted,
        proposed=request.proposed,
        accepted=request.accepted,
        lossless=lossless,
        near_ties=request.near_ties,
        logprobs=None if request.logprobs is None else request.logprobs[: len(request.tokens)],
    )


def limits(
    max_tokens: int | None,
    stop: Sequence[str],
    eos_ids: Sequence[int] | int | None,
    rules: Rules,
    logprobs: int | None = None,
) -> Limits:
    """The arguments of the calls above as one."""
    if logprobs is not None and logprobs < 0:
        raise UsageError(f"logprobs: 0 or more of the likeliest tokens can be noted, got {logprobs}")
    if max_tokens is not None and not isinstance(max_tokens, Integral):
        raise UsageError(f"max_tokens must be a whole number, got {max_tokens!r}")
    StopText(stop)  # checks it: a lone string would be taken for one stop string a character
    ends = (eos_ids,) if isinstance(eos_ids, int) else eos_ids
    return Limits(max_tokens, tuple(stop), None if ends is None else tuple(map(int, ends)), rules, logprobs)


def _for_row(sampling: Sampling, row: int) -> Sampling:
    return sampling if sampling.seed is None else dataclasses.replace(sampling, seed=sampling.seed + row)
