"""One answer in the making: its tokens, its random numbers, its text, and when it is finished."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from volvelle.decode.options import Rules, Sampling
from volvelle.decode.rules import constrain, is_empty
from volvelle.decode.sampling import choose, none_left, probabilities, process
from volvelle.decode.stop import StopText
from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig

if TYPE_CHECKING:
    from volvelle.systems.language.models import LanguageModel
    from volvelle.systems.language.tokenizer import TextTokenizer

Finish = Literal["eos", "stop", "length"]
NO_RULES = Rules()


class Token(NamedTuple):
    """One generated token, and the text that became certain with it (often its own; "" while a character is open)."""

    id: int
    text: str
    drafted: bool = False


class Scored(NamedTuple):
    """The log-probability that the model gave to a token of its answer, and its likeliest tokens there with theirs.

    By the model alone, before temperature, penalties and rules.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Generation:
    """A finished answer.

    `tokens` are all generated ids, with the one that ended it; `text` leaves out special tokens and everything from a
    stop string on. `finish` says why it ended: "eos", "stop" (a stop string) or "length" (max_tokens). `steps` counts
    forward passes, the prompt's included; `prompt_seconds` is the time of that first one, `seconds` of all of them.

    With a drafter: `drafted` says of each token whether it was accepted from a draft; `proposed[d]` counts the drafts
    that had a token d + 1 places behind the newest one, `accepted[d]` those of which it was kept. `lossless` says
    whether the acceptance rule leaves the distribution of answers as it is without drafts. `near_ties` counts the
    greedily chosen tokens that were ahead of the next best by less than what the width of a step changes in this model,
    or gaps in a tree do (None: not counted): there, above all, rounding may make the answer differ from the one without
    drafts.

    `logprobs` says of each token how likely it was, where that was asked for.
    """

    tokens: list[int]
    text: str
    finish: Finish
    prompt_tokens: int
    steps: int
    seconds: float
    prompt_seconds: float
    drafted: list[bool] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    lossless: bool = True
    near_ties: int | None = None
    logprobs: list[Scored] | None = None

    @property
    def accepted_per_step(self) -> float:
        """Tokens gained by a forward pass: 1 without a drafter."""
        return len(self.tokens) / self.steps

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first, by the time they took; 0 for a single token."""
        rest = self.seconds - self.prompt_seconds
        return (len(self.tokens) - 1) / rest if rest > 0 else 0.0


@dataclass(frozen=True)
class Limits:
    """When an answer ends, and what it may hold.

    It ends after `max_tokens` (None: when the context is full), at an eos id, at a stop string. `logprobs` is how many
    of the likeliest tokens are noted beside each one's own log-probability; None: nothing is.
    """

    max_tokens: int | None = 256
    stop: tuple[str, ...] = ()
    eos_ids: tuple[int, ...] | None = None
    rules: Rules = NO_RULES
    logprobs: int | None = None


class Request:
    """The state of one row of a batch.

    A decoder goes on from the `prompt`. An encoder-decoder reads it as its `source` (None for a decoder), and the
    answer goes on from the model's start token alone.
    """

    def __init__(self, model: LanguageModel, prompt: Sequence[int] | Tensor, sampling: Sampling, limits: Limits):
        self.prompt, self.rules = token_ids(prompt), limits.rules
        self.source: list[int] | None = None
        _check_prompt(model, self.prompt)
        _check_rules(model, self.rules)
        if isinstance(model.config, EncoderDecoderConfig):
            self.source, self.prompt = self.prompt, [model.config.start]
            self.rules = _filled(limits.rules, model.config)
        self.sampling, self.rule = sampling, replace(sampling, seed=None)
        self.max_tokens = _room(model, self.prompt, limits.max_tokens)
        tokenizer = model.tokenizer
        self.eos_ids = _eos_ids(tokenizer, limits.eos_ids, model.config.vocabulary)
        if limits.stop and tokenizer is None:
            raise UsageError("stop: this model has no tokenizer, so it has no text to find stop strings in")
        self._stop = StopText(limits.stop)
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._generator = None if sampling.greedy else seeded(sampling.seed)
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self._seen = torch.zeros(model.config.vocabulary, dtype=torch.bool, device=model.device)
            self._seen[torch.tensor(self.prompt)] = True
        self._counts: Tensor | None = None
        if sampling.counts:
            self._counts = torch.zeros(model.config.vocabulary, dtype=torch.int32, device=model.device)
        self.tokens: list[int] = []
        self.drafted: list[bool] = []
        self.proposed: list[int] = []
        self.accepted: list[int] = []
        self.near_ties: int | None = None
        self.logprobs: list[Scored] | None = None if limits.logprobs is None else []
        self._top = limits.logprobs or 0
        self.text = ""
        self.steps = 0
        self.finish: Finish | None = None

    @property
    def takes_argmax(self) -> bool:
        """Whether the next token is the likeliest, with no rule before it."""
        return self.sampling.greedy and self._seen is None and self._counts is None and not self.is_bound

    def all_argmax(self, count: int) -> bool:
        """Whether that holds for each of the next `count` tokens."""
        return self.takes_argmax and (self.rules.forced_last is None or self.left > count)

    @property
    def is_bound(self) -> bool:
        """Whether a rule has a say on the next token."""
        return self.binds(0)

    def binds(self, ahead: int) -> bool:
        """Whether a rule has a say on the token `ahead` places behind the next one."""
        return self.rules.bind(len(self.tokens) + ahead, self.max_tokens)

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return self.max_tokens - len(self.tokens)

    @property
    def length(self) -> int:
        """The tokens of prompt and answer so far."""
        return len(self.prompt) + len(self.tokens)

    @property
    def last(self) -> int:
        """The newest token, of the prompt when none is generated yet."""
        return self.tokens[-1] if self.tokens else self.prompt[-1]

    def choose(self, logits: Tensor) -> int:
        """Pick the next token from logits (v,) with this request's rules and random numbers."""
        scores = self.constrain(logits)
        if scores is not logits and is_empty(scores):
            raise none_left()
        return choose(scores, self.sampling, self._seen, self._generator, self._counts)

    def constrain(self, scores: Tensor, drafted: Sequence[int] = ()) -> Tensor:
        """The scores (v,) of the token behind the answer and `drafted` ones, as this request's rules leave them."""
        if not self.binds(len(drafted)):
            return scores
        tokens = [*self.tokens, *drafted]
        return constrain(scores, self.prompt, tokens, self.rules, eos=self.eos_ids, max_tokens=self.max_tokens)

    def seen(self, drafted: Sequence[int] = ()) -> Tensor | None:
        """Which tokens (v,) have occurred, `drafted` ones included; None where no rule asks."""
        if self._seen is None or not drafted:
            return self._seen
        return self._seen.index_fill(0, torch.tensor(drafted, device=self._seen.device), True)

    def counts(self, drafted: Sequence[int] = ()) -> Tensor | None:
        """How often the answer holds each token (v,), `drafted` ones included; None where no rule asks."""
        if self._counts is None or not drafted:
            return self._counts
        more = torch.tensor(drafted, device=self._counts.device)
        return self._counts.index_add(0, more, torch.ones_like(more, dtype=self._counts.dtype))

    def scores(self, logits: Tensor, drafted: Sequence[int] = ()) -> Tensor:
        """The logits (v,) of the token after the answer so far and `drafted` ones, as all rules leave them."""
        return process(self.constrain(logits, drafted), self.rule, self.seen(drafted), self.counts(drafted))

    def count(self, proposed: int, accepted: int) -> None:
        """Note that a draft reached `proposed` places behind the newest token, and that `accepted` tokens stayed."""
        for counts, reached in ((self.proposed, proposed), (self.accepted, accepted)):
            counts.extend([0] * (proposed - len(counts)))
            for place in range(reached):
                counts[place] += 1

    def note(self, logits: Tensor, tokens: Sequence[int]) -> None:
        """Note how likely the next `tokens` were by logits (m, v), of which the first are theirs."""
        if self.logprobs is None:
            return
        for token, scores in zip(tokens, logits.float().log_softmax(-1), strict=False):
            best = scores.topk(min(self._top, len(scores)))
            top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            self.logprobs.append(Scored(float(scores[token]), top))

    def uniform(self) -> float:
        """The next of this request's random numbers, from 0 to below 1; greedy requests use none."""
        if self._generator is None:
            return 0.5
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def fork(self) -> Request:
        """A row of a search that goes on from here. It makes no text: a hypothesis is read when it is chosen."""
        other = copy.copy(self)
        other.tokens, other.drafted, other._stream = list(self.tokens), list(self.drafted), None
        other._seen = None if self._seen is None else self._seen.clone()
        other.logprobs = None if self.logprobs is None else list(self.logprobs)
        other._counts = None if self._counts is None else self._counts.clone()
        return other

    def add(self, token: int, drafted: bool = False) -> Token:
        """Take one more token; sets `finish` when it is the last."""
        self.tokens.append(token)
        self.drafted.append(drafted)
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        ended = token in self.eos_ids
        piece = "" if ended or self._stream is None else self._stop.push(self._stream.push(token))
        if ended:
            self.finish = "eos"
        elif self._stop.stopped:
            self.finish = "stop"
        elif len(self.tokens) == self.max_tokens:
            self.finish = "length"
        if self.finish is not None and self._stream is not None:
            piece += self._stop.push(self._stream.flush())
            piece += self._stop.flush()
        self.text += piece
        return Token(token, piece, drafted)


def distributions(requests: Sequence[Request], logits: Tensor, drafted: Sequence[Sequence[int]]) -> Tensor:
    """What each row's next token is drawn from, (r, v), given logits (r, v) and the drafted tokens behind its answer.

    Target and drafts both go through this one function: the rules that bind at that place, then those of the sampling.
    Greedy rows have all on the likeliest token, and rows in which the rules leave no token have nothing.
    """
    bound = [i for i, (r, behind) in enumerate(zip(requests, drafted, strict=True)) if r.binds(len(behind))]
    if bound:
        logits = logits.float().clone()
        for i in bound:
            logits[i] = requests[i].constrain(logits[i], drafted[i])
    kinds: dict[Sampling, list[int]] = {}
    for i, request in enumerate(requests):
        kinds.setdefault(request.rule, []).append(i)
    if len(kinds) == 1:
        found = _distributions(requests, logits, drafted)
    else:
        found = torch.empty(logits.shape, device=logits.device)
        for rows in kinds.values():
            found[rows] = _distributions([requests[i] for i in rows], logits[rows], [drafted[i] for i in rows])
    for i in bound:
        if is_empty(logits[i]):
            found[i] = 0
    return found


def _distributions(requests: Sequence[Request], logits: Tensor, drafted: Sequence[Sequence[int]]) -> Tensor:
    """The same for rows of one sampling."""
    pairs = list(zip(requests, drafted, strict=True))
    seen = [mask for r, behind in pairs if (mask := r.seen(behind)) is not None]
    counts = [found for r, behind in pairs if (found := r.counts(behind)) is not None]
    rule = requests[0].rule
    return probabilities(logits, rule, torch.stack(seen) if seen else None, torch.stack(counts) if counts else None)


def seeded(seed: int | None) -> torch.Generator:
    """A generator of its own for one request; without a seed, one drawn from torch's global generator."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)


def token_ids(prompt: Sequence[int] | Tensor) -> list[int]:
    """The prompt as a list. Raises UsageError where it is a text, several rows, or holds anything but whole numbers."""
    if isinstance(prompt, str):
        tip = "model.tokenizer.encode(text) gives them"
        raise UsageError(f"a prompt is a row of token ids, got the text {prompt[:40]!r}", tip=tip)
    if isinstance(prompt, Tensor) and prompt.dim() != 1:
        tip = "pass ids[0]" if prompt.dim() == 2 and len(prompt) == 1 else "generate_batch takes several prompts"
        raise UsageError(f"a prompt is a row of token ids, got a tensor of shape {tuple(prompt.shape)}", tip=tip)
    tokens: list[int] = []
    for token in prompt.tolist() if isinstance(prompt, Tensor) else prompt:
        try:
            tokens.append(operator.index(token))
        except TypeError as error:
            tip = "generate_batch takes several prompts" if hasattr(token, "__len__") else None
            raise UsageError(f"a prompt is a row of token ids, whole numbers; {token!r} is none", tip=tip) from error
    return tokens


def check_tokens(prompt: Sequence[int], vocabulary: int) -> None:
    """Raise VolvelleError for a prompt without tokens, or with ones that are none of the vocabulary."""
    if not prompt:
        raise VolvelleError("the prompt is empty: a model needs at least one token to go on from")
    if not 0 <= min(prompt) <= max(prompt) < vocabulary:
        wrong = next(token for token in prompt if not 0 <= token < vocabulary)
        raise VolvelleError(f"prompt token {wrong} is outside the model's vocabulary of {vocabulary}")


def _check_prompt(model: LanguageModel, prompt: list[int]) -> None:
    check_tokens(prompt, model.config.vocabulary)
    longest = model.config.context if isinstance(model.config, EncoderDecoderConfig) else model.room
    if len(prompt) > longest:
        raise _too_long(prompt, longest)


def _check_rules(model: LanguageModel, rules: Rules) -> None:
    for name in ("forced_first", "forced_last"):
        token = getattr(rules, name)
        if token is not None and token >= model.config.vocabulary:
            raise UsageError(f"rules.{name} = {token} is outside the model's vocabulary of {model.config.vocabulary}")


def _too_long(prompt: list[int], context: int) -> VolvelleError:
    return VolvelleError(
        f"the prompt has {len(prompt)} tokens, the model's context is {context}: no room for an answer",
        tip="shorten the prompt; nothing is cut silently",
    )


def _filled(rules: Rules, config: EncoderDecoderConfig) -> Rules:
    """The rules, and the model's own where they leave it to the model."""
    first = config.forced_first if rules.forced_first is None else rules.forced_first
    last = config.forced_last if rules.forced_last is None else rules.forced_last
    return replace(rules, forced_first=first, forced_last=last)


def _room(model: LanguageModel, prompt: list[int], max_tokens: int | None) -> int:
    context = model.room
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"max_tokens must be at least 1, got {max_tokens}")
    room = context - len(prompt)
    if room < 1:
        raise _too_long(prompt, context)
    if max_tokens is not None and max_tokens > room:
        raise VolvelleError(
            f"the prompt's {len(prompt)} tokens and max_tokens={max_tokens} exceed the model's context of {context}",
            tip=f"max_tokens={room} fits",
        )
    return room if max_tokens is None else max_tokens


def _eos_ids(tokenizer: TextTokenizer | None, asked: Sequence[int] | None, vocabulary: int) -> frozenset[int]:
    """The ids that end an answer. A tokenizer may know more of them than the model has; who asks for one may not."""
    if asked is None:
        return frozenset(token for token in (() if tokenizer is None else tokenizer.eos_ids) if token < vocabulary)
    for token in asked:
        if not 0 <= token < vocabulary:
            raise UsageError(
                f"eos id {token} is outside the model's vocabulary of {vocabulary}", tip="eos_ids=() ends at none"
            )
    return frozenset(asked)
