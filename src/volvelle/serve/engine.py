"""The thread that owns the model: texts come in through a bounded queue, tokens go out to whoever asked.

Nothing here knows HTTP. A job's `tell` is called in the engine's thread, in order, and must not block: first with
pieces of the answer, at last with all of it or with an error.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from volvelle.decode.contract import Checked
from volvelle.decode.options import Sampling
from volvelle.decode.request import Generation, Scored, Token
from volvelle.decode.seats import PART, Reading, Seats
from volvelle.errors import VolvelleError

log = logging.getLogger("volvelle.serve")


class Busy(VolvelleError):
    """As many texts wait as may."""


class Closing(VolvelleError):
    """The engine ends; it takes no more texts, and those it cannot finish in time fail with this."""


class Failed(VolvelleError):
    """The model failed at a step; what was being written is lost."""


class Piece(NamedTuple):
    """What a step gained: tokens, how likely they were where that is asked for, what became of the step's draft."""

    tokens: list[Token]
    scored: list[Scored] | None
    checked: Checked | None = None


Told = Piece | Generation | VolvelleError


@dataclass(eq=False)
class Job:
    """A text to be written. `leave()` ends it where it stands, from any thread; nothing is told after that."""

    prompt: Sequence[int]
    tell: Callable[[Told], None]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    adapter: str | None = None
    arrived: float = field(default_factory=time.monotonic)
    left: bool = False

    def leave(self) -> None:
        """Nobody waits for it any more."""
        self.left = True


@dataclass
class Load:
    """What the engine is doing, and has done since it began."""

    waiting: int = 0
    running: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0


class Engine:
    """Writes the texts of up to `seats.count` jobs side by side, and lets `queue` more wait.

    `read_ahead` prompts at most are being read or hold what was read, while they wait for a seat.
    """

    def __init__(self, seats: Seats, *, queue: int = 64, read_ahead: int = 2):
        self.seats, self.queue, self.read_ahead = seats, queue, read_ahead
        self.load = Load()
        self._inbox: deque[Job] = deque()
        self._reading: list[tuple[Job, Reading]] = []
        self._seated: dict[int, tuple[Job, Reading]] = {}
        self._wake = threading.Condition()
        self._until: float | None = None  # when it ends, once it is asked to
        self._thread = threading.Thread(target=self._run, name="volvelle-engine", daemon=True)

    def start(self) -> Engine:
        """Begin to work."""
        self._thread.start()
        return self

    @property
    def alive(self) -> bool:
        """Whether it works and takes texts."""
        return self._thread.is_alive() and self._until is None

    def submit(self, *jobs: Job) -> None:
        """Take jobs, all or none.

        Raises Busy when they do not fit into the queue, Closing when the engine ends, and VolvelleError for a text that
        could not be written: who asks hears of it before anything is answered.
        """
        for job in jobs:
            self.seats.fits(job.prompt, job.max_tokens)
        with self._wake:
            if not self.alive:
                raise Closing("the server is shutting down")
            if len(self._inbox) + len(jobs) > self.queue:
                raise Busy(f"{len(self._inbox)} texts wait already, {self.queue} may")
            self._inbox.extend(jobs)
            self.load.waiting = len(self._inbox)
            self._wake.notify()

    def end(self, seconds: float = 0.0) -> None:
        """Take no more texts, go on for at most so many seconds, then fail what is left; returns at once."""
        with self._wake:
            self._until = time.monotonic() + seconds
            self._wake.notify()

    def close(self, seconds: float = 0.0) -> None:
        """The same, and wait until it has ended."""
        self.end(seconds)
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        with self.seats:
            while self._wait():
                try:
                    self._turn()
                except Exception as error:  # whatever it is: those who wait must hear of it
                    log.exception("a step failed")
                    self._fail(Failed(f"the model failed: {error}"))
        self._fail(Closing("the server shut down before the answer was finished"))

    def _wait(self) -> bool:
        """Sleep until there is something to do; False: the end."""
        with self._wake:
            while True:
                busy = bool(self._inbox or self._reading or self._seated)
                if self._until is not None and (not busy or time.monotonic() >= self._until):
                    return False
                if busy:
                    return True
                self._wake.wait()

    def _turn(self) -> None:
        """A part's tokens of prompts, seats for those that are read, and one step of all that sit."""
        self._dismiss()
        self._advance()
        for row, tokens in _by_row(self.seats.step()).items():
            job, reading = self._seated[row]
            self.load.tokens += len(tokens)
            self._tell(job, reading, tokens, self.seats.checked(row))
            if reading.request.finish is not None:
                del self._seated[row]
        self.load.running = len(self._seated)

    def _dismiss(self) -> None:
        """Let go of texts that nobody waits for."""
        with self._wake:
            self._inbox = deque(job for job in self._inbox if not job.left)
            self.load.waiting = len(self._inbox)
        self._reading = [pair for pair in self._reading if not pair[0].left]
        for row, (job, reading) in list(self._seated.items()):
            if job.left:
                self.seats.leave(row)
                self._count(reading)
                del self._seated[row]

    def _admit(self) -> None:
        while len(self._reading) < self.read_ahead:
            with self._wake:
                if not self._inbox:
                    break
                job = self._inbox.popleft()
                self.load.waiting = len(self._inbox)
            try:
                reading = self.seats.read(
                    job.prompt,
                    sampling=job.sampling,
                    max_tokens=job.max_tokens,
                    stop=job.stop,
                    logprobs=job.logprobs,
                    adapter=job.adapter,
                )
            except VolvelleError as error:
                job.tell(error)
                continue
            self.load.prompt_tokens += len(job.prompt)
            self._reading.append((job, reading))

    def _advance(self) -> None:
        """Read on in the prompts, a part's tokens of them, and seat those that are read.

        The texts that sit wait no longer for many short prompts than for one long one, and many that come at once
        soon sit together.
        """
        left = PART
        self._seat()
        self._admit()
        while left > 0 and (reading := next((one for _, one in self._reading if not one.read), None)) is not None:
            before = reading.unread
            reading.advance()
            left -= before - reading.unread
            self._seat()
            self._admit()

    def _seat(self) -> None:
        """Seats for those whose turn it is and that are read."""
        while self._reading and self._reading[0][1].read and self.seats.free:
            job, reading = self._reading.pop(0)
            row, token = self.seats.sit(reading)
            self.load.tokens += 1
            self._tell(job, reading, [token])
            if reading.request.finish is None:
                self._seated[row] = job, reading

    def _tell(self, job: Job, reading: Reading, tokens: list[Token], checked: Checked | None = None) -> None:
        if job.left:
            return
        request = reading.request
        since = len(request.tokens) - len(tokens)
        scored = None if request.logprobs is None else request.logprobs[since : len(request.tokens)]
        job.tell(Piece(tokens, scored, checked))
        if reading.request.finish is not None:
            self._count(reading)
            job.tell(reading.generation())

    def _count(self, reading: Reading) -> None:
        self.load.drafted += sum(reading.request.proposed)
        self.load.accepted += sum(reading.request.accepted)

    def _fail(self, error: VolvelleError) -> None:
        with self._wake:
            waiting, self._inbox = list(self._inbox), deque()
        jobs = [*waiting, *(job for job, _ in self._reading), *(job for job, _ in self._seated.values())]
        for row in list(self._seated):
            self.seats.leave(row)
        self._reading, self._seated = [], {}
        self.load.waiting = self.load.running = 0
        for job in jobs:
            if not job.left:
                job.left = True
                job.tell(error)


def _by_row(events: Sequence[Any]) -> dict[int, list[Token]]:
    found: dict[int, list[Token]] = {}
    for row, token in events:
        found.setdefault(row, []).append(token)
    return found
