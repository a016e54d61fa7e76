"""Verbs that the studio runs beside itself: one process at a time, a short queue, output by server-sent events.

A room starts a job with words of its own (`jobs.start("claim rope", ["claim", "rope"])`); no request ever chooses them
freely. The process is `python -m volvelle WORDS` in the studio's folder and ends with the studio.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import APIRouter, FastAPI
from fastapi.responses import StreamingResponse

from volvelle.serve.errors import Refused

State = Literal["waiting", "running", "finished", "failed", "cancelled"]
WAITING = 4
"""Jobs that may wait behind the one that runs."""
KEPT = 20
"""Jobs that have ended and can still be looked at."""
LINES = 2000
"""Lines of output kept for each job; the first ones go."""
PATIENCE = (8.0, 4.0)
"""Seconds that a process gets after SIGINT, and then after SIGTERM, before it is killed."""
SIGNS_OF_LIFE = 15.0


@dataclass
class Job:
    """One verb that waits, runs or has ended."""

    number: int
    title: str
    words: tuple[str, ...]
    state: State = "waiting"
    code: int | None = None
    began: float | None = None
    ended: float | None = None
    dropped: int = 0
    """Lines that were left out of `lines` at their beginning."""
    lines: list[str] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def over(self) -> bool:
        """Whether it has ended, in any way."""
        return self.state not in ("waiting", "running")

    def told(self) -> dict[str, Any]:
        """What the page shows of it."""
        until = time.time() if self.ended is None else self.ended
        return {
            "number": self.number,
            "title": self.title,
            "command": shlex.join(("volvelle", *self.words)),
            "state": self.state,
            "code": self.code,
            "seconds": None if self.began is None else round(until - self.began, 1),
        }

    def change(self, state: State | None = None) -> None:
        """Wake up who waits for news."""
        self.state = state or self.state
        self.changed.set()
        self.changed = asyncio.Event()

    def say(self, line: str) -> None:
        """Add a line of output."""
        self.lines.append(line)
        if len(self.lines) > LINES:
            del self.lines[0]
            self.dropped += 1
        self.change()


class Jobs:
    """The queue and the one process; `routes()` shows both and belongs to the studio's app, which ends them."""

    def __init__(self, *, waiting: int = WAITING, command: Sequence[str] = (sys.executable, "-m", "volvelle")):
        self.waiting, self.command = waiting, tuple(command)
        self.jobs: dict[int, Job] = {}
        self._count = 0
        self._queue: asyncio.Queue[Job] = asyncio.Queue()
        self._process: asyncio.subprocess.Process | None = None

    def start(self, title: str, words: Sequence[str]) -> Job:
        """Put a verb in the queue. Raises Refused (409) for one that is there already, (503) when the queue is full."""
        unfinished = [job for job in self.jobs.values() if not job.over]
        if any(job.words == tuple(words) for job in unfinished):
            raise Refused(409, f"{title} is already waiting or running")
        if len(unfinished) > self.waiting:
            raise Refused(503, f"{len(unfinished)} jobs are already waiting or running", code="overloaded")
        self._count += 1
        job = Job(self._count, title, tuple(words))
        self.jobs[job.number] = job
        for number in [one.number for one in self.jobs.values() if one.over][:-KEPT]:
            del self.jobs[number]
        self._queue.put_nowait(job)
        return job

    def find(self, number: int) -> Job:
        """A job by its number, or Refused (404)."""
        if number not in self.jobs:
            raise Refused(404, f"there is no job {number}")
        return self.jobs[number]

    async def cancel(self, job: Job) -> None:
        """End a job: one that waits never runs, one that runs gets the signal of Ctrl-C first."""
        if job.over:
            return
        running = job.state == "running"
        job.change("cancelled")
        if running and self._process is not None:
            await _end(self._process)

    @contextlib.asynccontextmanager
    async def life(self, _: FastAPI) -> AsyncIterator[None]:
        """Run the queue for as long as the app lives."""
        worker = asyncio.create_task(self._work())
        try:
            yield
        finally:
            for job in list(self.jobs.values()):
                await self.cancel(job)
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker

    def end(self, seconds: float) -> None:
        """The server is told to end: streams stop at once (called by a signal's handler)."""
        for job in self.jobs.values():
            if not job.over:
                job.change("cancelled")

    async def _work(self) -> None:
        while True:
            job = await self._queue.get()
            if job.over:
                continue
            job.began = time.time()
            job.change("running")
            try:
                job.code = await self._run(job)
            finally:
                job.ended = time.time()
                job.change(None if job.over else "finished" if job.code == 0 else "failed")

    async def _run(self, job: Job) -> int:
        process = await asyncio.create_subprocess_exec(
            *self.command,
            *job.words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "COLUMNS": "100"},
            start_new_session=True,
        )
        self._process = process
        assert process.stdout is not None
        try:
            if job.over:  # cancelled while the process was made
                return -1
            rest = b""
            while chunk := await process.stdout.read(1 << 14):
                *whole, rest = (rest + chunk).split(b"\n")
                for line in whole:
                    job.say(line.decode("utf-8", "replace").rpartition("\r")[2][:4000])
                rest = rest[-4000:]
            if rest:
                job.say(rest.decode("utf-8", "replace"))
            return await process.wait()
        finally:
            await _end(process)
            self._process = None

    def routes(self) -> APIRouter:
        """What the page may ask of jobs; its lifespan runs the queue."""
        router = APIRouter(prefix="/studio/api/jobs", lifespan=self.life)

        @router.get("")
        async def listed() -> dict[str, Any]:
            return {"jobs": [job.told() for job in self.jobs.values()]}

        @router.get("/{number}/events")
        async def events(number: int) -> StreamingResponse:
            """A stream of `line` (a line of output) and `state` (the job); it ends with the job."""
            return StreamingResponse(follow(self.find(number)), media_type="text/event-stream")

        @router.post("/{number}/cancel")
        async def cancel(number: int) -> dict[str, Any]:
            job = self.find(number)
            await self.cancel(job)
            return job.told()

        return router


async def follow(job: Job) -> AsyncIterator[str]:
    """The events of a job from its first kept line on."""
    seen, state = job.dropped, None
    while True:
        changed, over = job.changed, job.over
        if job.state != state:
            state = job.state
            yield _event("state", job.told())
        for line in job.lines[max(seen - job.dropped, 0) :]:
            yield _event("line", line)
        seen = job.dropped + len(job.lines)
        if over:
            return
        try:
            await asyncio.wait_for(changed.wait(), SIGNS_OF_LIFE)
        except TimeoutError:
            yield ": still here\n\n"


def _event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a process and what it started: as Ctrl-C would, then harder."""
    for sign, seconds in ((signal.SIGINT, PATIENCE[0]), (signal.SIGTERM, PATIENCE[1]), (signal.SIGKILL, None)):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), seconds)
