"""One answer in the making: its tokens, its random numbers, its text, and when it is finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from volvelle.decode.options import Sampling
from volvelle.decode.sampling import choose
from volvelle.decode.stop import StopText
from volvelle.errors import UsageError, VolvelleError

if TYPE_CHECKING:
    from volvelle.systems.language.decoder import Decoder
    from volvelle.systems.language.tokenizer import TextTokenizer

Finish = Literal["eos", "stop", "length"]


class Token(NamedTuple):
    """One generated token, and the text that became certain with it (often its own; "" while a character is open)."""

    id: int
    text: str
    drafted: bool = False


@dataclass(frozen=True)
class Generation:
    """A finished answer.

    `tokens` are all generated ids, with the one that ended it; `text` leaves out special tokens and everything from a
    stop string on. `finish` says why it ended: "eos", "stop" (a stop string) or "length" (max_tokens). `steps` counts
    forward passes, the prompt's included; `prompt_seconds` is the time of that first one, `seconds` of all of them.
    """

    tokens: list[int]
    text: str
    finish: Finish
    prompt_tokens: int
    steps: int
    seconds: float
    prompt_seconds: float

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
    """When an answer ends: after `max_tokens` (None: when the context is full), at an eos id, at a stop string."""

    max_tokens: int | None = 256
    stop: tuple[str, ...] = ()
    eos_ids: tuple[int, ...] | None = None


class Request:
    """The state of one row of a batch."""

    def __init__(self, model: Decoder, prompt: Sequence[int] | Tensor, sampling: Sampling, limits: Limits):
        self.prompt = [int(token) for token in prompt]
        self.sampling = sampling
        self.max_tokens = _room(model, self.prompt, limits.max_tokens)
        tokenizer = model.tokenizer
        self.eos_ids = frozenset(_eos_ids(tokenizer) if limits.eos_ids is None else limits.eos_ids)
        if limits.stop and tokenizer is None:
            raise UsageError("stop: this model has no tokenizer, so it has no text to find stop strings in")
        self._stop = StopText(limits.stop)
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._generator = None if sampling.greedy else seeded(sampling.seed)
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self._seen = torch.zeros(model.config.vocabulary, dtype=torch.bool, device=model.device)
            self._seen[torch.tensor(self.prompt)] = True
        self.tokens: list[int] = []
        self.text = ""
        self.steps = 0
        self.finish: Finish | None = None

    @property
    def takes_argmax(self) -> bool:
        """Whether the next token is the likeliest, with no rule before it."""
        return self.sampling.greedy and self._seen is None

    @property
    def last(self) -> int:
        """The newest token, of the prompt when none is generated yet."""
        return self.tokens[-1] if self.tokens else self.prompt[-1]

    def choose(self, logits: Tensor) -> int:
        """Pick the next token from logits (v,) with this request's rules and random numbers."""
        return choose(logits, self.sampling, self._seen, self._generator)

    def add(self, token: int, drafted: bool = False) -> Token:
        """Take one more token; sets `finish` when it is the last."""
        self.tokens.append(token)
        if self._seen is not None:
            self._seen[token] = True
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


def seeded(seed: int | None) -> torch.Generator:
    """A generator of its own for one request; without a seed, one drawn from torch's global generator."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)


def _room(model: Decoder, prompt: list[int], max_tokens: int | None) -> int:
    context, vocabulary = model.config.context, model.config.vocabulary
    if not prompt:
        raise VolvelleError("the prompt is empty: a model needs at least one token to go on from")
    if not 0 <= min(prompt) <= max(prompt) < vocabulary:
        wrong = next(token for token in prompt if not 0 <= token < vocabulary)
        raise VolvelleError(f"prompt token {wrong} is outside the model's vocabulary of {vocabulary}")
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"max_tokens must be at least 1, got {max_tokens}")
    room = context - len(prompt)
    if room < 1:
        raise VolvelleError(
            f"the prompt has {len(prompt)} tokens, the model's context is {context}: no room for an answer",
            tip="shorten the prompt; nothing is cut silently",
        )
    if max_tokens is not None and max_tokens > room:
        raise VolvelleError(
            f"the prompt's {len(prompt)} tokens and max_tokens={max_tokens} exceed the model's context of {context}",
            tip=f"max_tokens={room} fits",
        )
    return room if max_tokens is None else max_tokens


def _eos_ids(tokenizer: TextTokenizer | None) -> Sequence[int]:
    return () if tokenizer is None else tuple(tokenizer.eos_ids)
