"""Continuous batching: texts that begin and end when they like, decoded together in a fixed number of rows.

A text is read alone, in parts if it is long, then takes a seat: its keys and values move into a row of the common
cache, and from then on it gets its tokens in the same steps as the others (Yu et al. 2022, "Orca", sections 3 and 4.2).
When it ends or leaves, the seat is free at once. With a drafter each row keeps as many tokens of a step as it accepts.

    with Seats(model, 8, context=1024) as seats:
        reading = seats.read(prompt_ids, max_tokens=100)
        while not reading.advance():
            seats.step()                        # the others go on meanwhile
        events = [seats.sit(reading)]
        while seats.taken:
            events += seats.step()              # Event(row, token); reading.row is the seat

Shapes: b rows, n tokens of a step or of a part of a prompt.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from volvelle.adapt.model import record_of, using
from volvelle.decode.accept_exact import EXACT
from volvelle.decode.bitwise import WIDTH, AnyWidth, FixedWidth, in_order, is_any_width
from volvelle.decode.contract import Acceptance, Checked, Drafter, Policy, Seen
from volvelle.decode.generation import GREEDY, Exactness, finished, limits
from volvelle.decode.loop import Decoding, Event, Help, choose_next, computing, note_logprobs, step
from volvelle.decode.options import Rules, Sampling
from volvelle.decode.policy import Adaptive
from volvelle.decode.request import NO_RULES, Generation, Limits, Request, check_tokens, token_ids
from volvelle.decode.speculation import Speculation
from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.native.step import MOST
from volvelle.systems.language.projections import fuse_projections
from volvelle.systems.modes import evaluating

PART = 256
"""Tokens of a prompt that are read at once, while the others wait."""


class Reading:
    """A text before it has a seat: how much of its prompt is read."""

    def __init__(self, seats: Seats, request: Request, adapter: str | None):
        self.seats, self.request, self.adapter = seats, request, adapter
        self.row: int | None = None
        """The seat that was taken."""
        self.started = time.perf_counter()
        self.first = self.last = 0.0
        with computing(seats.model), seats.using(adapter):
            self.cache, self._done = seats.model.new_cache(1, len(request.prompt)), 0
        self._logits: Tensor | None = None
        self._states: list[Tensor] = []

    @property
    def read(self) -> bool:
        """Whether all of the prompt is read."""
        return self._logits is not None

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are not read yet."""
        return len(self.request.prompt) - self._done

    def advance(self) -> bool:
        """Read one more part of the prompt; whether all of it is read."""
        seats, prompt = self.seats, self.request.prompt
        if self._logits is None:
            part = prompt[self._done : self._done + (seats.part or len(prompt))]
            ids = torch.tensor([part], device=seats.model.device)
            with computing(seats.model), seats.using(self.adapter):
                logits, states = step(seats.model, self.cache, ids, None, 1, seats.decoding.read)
                self.cache.commit()
            self._done += len(part)
            if seats.decoding.drafts is not None:
                self._states.append(states)
            if self._done == len(prompt):
                self._logits = logits
        return self._logits is not None

    def choose(self) -> Event:
        """Choose the first token, as that of no row yet."""
        if self._logits is None:
            raise VolvelleError("seats: a text takes a seat when its prompt is read", tip="advance() says when it is")
        self.request.steps += 1
        with torch.inference_mode():
            accepted = choose_next(self._logits, None, [self.request])
            note_logprobs(self._logits, accepted, [self.request])
        self.first = self.last = time.perf_counter()
        return Event(-1, self.request.add(accepted.tokens[0][0]))

    def seen(self) -> Seen:
        """The prompt, for a drafter."""
        return Seen(torch.tensor([self.request.prompt], device=self._states[0].device), torch.cat(self._states, 1))

    def generation(self) -> Generation:
        """The answer, once it is finished."""
        accept = self.seats.accept
        whole = accept is None or accept.lossless(self.request.sampling)
        return finished(
            self.request, self.last - self.started, whole, prompt_seconds=max(self.first - self.started, 0.0)
        )


class Seats:
    """Rows for `count` texts of up to `context` tokens (prompt and answer), and the texts that are in them.

    The drafter is one that takes texts which join, as all of this library's do. `exact` = "bitwise" computes every step
    in one shape, so that an answer does not depend on what is in the other rows, not even by rounding; prompts are then
    read whole, and a compiled step's 32 tokens are shared: from 17 seats on none is left for drafts. Raises
    VolvelleError for a model or a drafter that cannot be used so.
    """

    def __init__(
        self,
        model: Decoder,
        count: int,
        *,
        context: int,
        drafter: Drafter | None = None,
        acceptance: Acceptance = EXACT,
        policy: Policy | None = None,
        exact: Exactness = "default",
    ):
        if count < 1:
            raise UsageError(f"seats: at least one is wanted, got {count}")
        if not 2 <= context <= model.room:
            raise UsageError(f"seats: a context of 2 to {model.room} tokens is wanted, got {context}")
        self.model, self.count, self.context = model, count, context
        self.accept = None if drafter is None else acceptance
        self.part: int | None = None if exact == "bitwise" else PART
        record = record_of(model)
        self.adapter = record.switch.chosen if record is not None and isinstance(record.switch.chosen, str) else None
        """The adapter of texts that name none: the one that acted when the seats were made."""
        self._modules = (model, *(() if drafter is None else drafter.modules))
        self._open = contextlib.ExitStack()
        self._idle = Request(model, [0], GREEDY, Limits(1, eos_ids=()))
        self._idle.finish = "length"
        self._sitting: list[Reading | None] = [None] * count
        help = None if drafter is None else Help(drafter, acceptance, policy or Adaptive())
        self.decoding = self._begin(help, exact)

    def _begin(self, help: Help | None, exact: Exactness) -> Decoding:
        model, requests = self.model, [self._idle] * self.count
        for one in self._modules:
            if isinstance(one, Decoder):
                fuse_projections(one)
        forward, whole = None, False
        if exact == "bitwise":
            whole = is_any_width(model)
            most = MOST // self.count if whole else WIDTH
            if most < 1:
                raise VolvelleError(f"exact=bitwise: at most {MOST} seats, got {self.count}")
            help = None if help is None else help._replace(straight=most)
            forward = AnyWidth() if whole else FixedWidth(1 if help is None else WIDTH, 0)
        with computing(model):
            drafts = None
            if help is not None:
                drafts = Speculation(model, model, requests, help, forward or step, self.context)
                for row in range(self.count):  # says at once where a drafter cannot
                    drafts.drafting.join(row, self._idle)
            width = 1 if drafts is None else max(WIDTH, 1 + drafts.drafting.width)
            cache = model.new_seats(self.count, model.ahead + self.context + width)
            if exact == "bitwise":
                reach = in_order(cache).context
                if isinstance(forward, FixedWidth):
                    forward.reach = reach
        return Decoding(model, requests, cache, drafts=drafts, forward=forward, read=True)

    def __enter__(self) -> Seats:
        self._open.enter_context(evaluating(*self._modules))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    @property
    def taken(self) -> int:
        """The seats in which a text is being written."""
        return sum(one is not None for one in self._sitting)

    @property
    def free(self) -> int:
        """The others."""
        return self.count - self.taken

    def read(
        self,
        prompt_ids: Sequence[int] | Tensor,
        *,
        sampling: Sampling = GREEDY,
        max_tokens: int | None = 256,
        stop: Sequence[str] = (),
        eos_ids: Sequence[int] | int | None = None,
        rules: Rules = NO_RULES,
        logprobs: int | None = None,
        adapter: str | None = None,
    ) -> Reading:
        """Begin a text; the arguments are those of `generate`, and the name of an adapter, None = `self.adapter`.

        Raises VolvelleError when the prompt is empty or does not fit with `max_tokens` into the context.
        """
        room = self.fits(prompt_ids, max_tokens)
        ends = limits(room if max_tokens is None else max_tokens, stop, eos_ids, rules, logprobs)
        adapter = adapter or self.adapter
        with self.using(adapter):
            request = Request(self.model, prompt_ids, sampling, ends)
        return Reading(self, request, adapter)

    def fits(self, prompt_ids: Sequence[int] | Tensor, max_tokens: int | None) -> int:
        """How many tokens an answer to this prompt may have; to be asked from any thread.

        Raises VolvelleError where `read` would for the prompt and `max_tokens`.
        """
        tokens = token_ids(prompt_ids)
        length = len(tokens)
        room = self.context - length
        if length and (room < 1 or (max_tokens is not None and max_tokens > room)):
            wanted = f" and max_tokens={max_tokens}" if max_tokens is not None and room >= 1 else ""
            raise VolvelleError(
                f"the prompt's {length} tokens{wanted} exceed the context of {self.context}",
                tip=f"max_tokens={room} fits" if room >= 1 else "shorten the prompt; nothing is cut silently",
            )
        check_tokens(tokens, self.model.config.vocabulary)
        return room

    def sit(self, reading: Reading) -> Event:
        """Take a free seat with a text that is read, and get its first token; one that ends with it takes none.

        Raises VolvelleError when no seat is free.
        """
        if not self.free:
            raise VolvelleError(f"seats: all {self.count} are taken")
        event = reading.choose()
        if reading.request.finish is not None:
            return event
        row = self._sitting.index(None)
        with computing(self.model):
            cache: Any = self.decoding.cache
            cache.adopt(row, reading.cache)
            self.decoding.requests[row] = reading.request
            if self.decoding.drafts is not None:
                self.decoding.drafts.join(row, reading.request, reading.seen())
        self._sitting[row], reading.row = reading, row
        del reading.cache, reading._states  # the common cache has them now
        return Event(row, event.token)

    def step(self) -> list[Event]:
        """One step of all texts: what each gained. Those that end leave their seats."""
        if not self.taken:
            return []
        names = [None if one is None else one.adapter for one in self._sitting]
        with self.using(names if any(names) else None):
            events = self.decoding.step()
        now = time.perf_counter()
        for row in {event.row for event in events}:
            one = self._sitting[row]
            assert one is not None
            one.last = now
            if one.request.finish is not None:
                self._empty(row)
        self._forget()
        return events

    def checked(self, row: int) -> Checked | None:
        """What became of the draft that the newest step had for this seat; None where it had none."""
        drafts = self.decoding.drafts
        return None if drafts is None else drafts.checked(row)

    def leave(self, row: int) -> None:
        """End the text in this seat where it stands."""
        if self._sitting[row] is not None:
            self._empty(row)
            self._forget()

    def _empty(self, row: int) -> None:
        self._sitting[row] = None
        self.decoding.requests[row] = self._idle

    def _forget(self) -> None:
        """Idle rows take part in steps too: what these write is dropped."""
        idle = [row for row, one in enumerate(self._sitting) if one is None]
        if idle:
            with computing(self.model):
                self.decoding.cache.forget(torch.tensor(idle, device=self.model.device))

    @contextlib.contextmanager
    def using(self, adapters: str | Sequence[str | None] | None) -> Iterator[None]:
        """With these adapters, None = the base; a model may have none."""
        with contextlib.ExitStack() as stack:
            if adapters is not None or record_of(self.model) is not None:
                stack.enter_context(using(self.model, adapters))
            yield
