"""Heartbeats: every rank says that it is alive, so that a dead or stopped one is noticed, and named, by all others.

A thread of each rank counts up a number in the group's store and reads everybody's. A rank whose number stands still
for `timeout` seconds is lost; one whose process is gone from this machine, at once. torch's own collectives say only
that a connection was closed, or that time is up, and not whose fault it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from volvelle.errors import VolvelleError
from volvelle.processes import birth, stat_fields

GRACE = 10.0
"""Seconds in which a rank may leave its collective by itself once another is known to be lost."""


class RankLost(VolvelleError):
    """Another rank died, was stopped, or failed; `rank` is that rank."""

    def __init__(self, rank: int, how: str, *, kept: str = "", tip: str | None = None):
        super().__init__(f"rank {rank} {how}; every rank stops{kept}", tip=tip)
        self.rank, self.how = rank, how


class Watch:
    """One rank's heartbeat, and its view of the others'.

    `store` is a connection of its own: the thread must not wait for what the main thread does; `hosted` says whether it
    lives in rank 0 (else in the launcher). On this machine a stopped process that is lost is killed: it can do no more
    good, and its closed connections wake up whoever waits for it. A rank that still hangs `GRACE` seconds later ends
    through `leave`; `leaving` is set once it is on its way out.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world: int,
        timeout: float,
        *,
        hosted: bool = True,
        leaving: threading.Event | None = None,
        leave: Callable[[int], None] = os._exit,
    ):
        self.store, self.rank, self.world, self.timeout, self._leave = store, rank, world, timeout, leave
        self.hosted = hosted
        self.interval = min(1.0, timeout / 10)
        self.found: tuple[int, str] | None = None
        self._count = 0
        self._ended = threading.Event()
        self._leaving = leaving or threading.Event()
        self._thread = threading.Thread(target=self._run, name="volvelle-heartbeat", daemon=True)
        self._others = [r for r in range(world) if r != rank]
        self._who: dict[int, dict[str, Any]] = {}
        me = {"host": socket.gethostname(), "pid": os.getpid(), "born": birth(os.getpid())}
        store.set(f"who/{rank}", json.dumps(me))
        store.set(f"word/{rank}", "")
        store.set(f"beat/{rank}", "0")

    def start(self) -> None:
        """Begin, once all ranks have made their Watch."""
        self._who = {r: json.loads(self.store.get(f"who/{r}")) for r in self._others}
        self._thread.start()

    def close(self, word: dict[str, Any] | None = None) -> None:
        """Say the last word (nothing: that all went well) and stop watching."""
        self.say(word or {"done": True})
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(2 * self.interval + 1)

    def say(self, word: dict[str, Any]) -> None:
        """Leave a last word for the others: why this rank stops."""
        with contextlib.suppress(RuntimeError):  # the store may be gone with the process that held it
            self.store.set(f"word/{self.rank}", json.dumps(word))

    def leave_soon(self) -> None:
        """The main thread has noticed and is on its way out: do not end the process under it."""
        self._leaving.set()

    def verdict(self, patience: float) -> tuple[int, str] | None:
        """Which rank is to blame and what happened to it, waiting at most `patience` seconds for it to show."""
        until = time.monotonic() + patience
        while True:
            try:
                found = self.found or self._last_words() or self._dead()
            except RuntimeError:
                found = self.found
            if found or time.monotonic() > until:
                return found
            time.sleep(0.05)

    def first(self) -> bool:
        """True for the first rank that asks: one of them tells the user."""
        try:
            return self.store.add("told", 1) == 1
        except RuntimeError:
            return True

    def _run(self) -> None:
        clock = time.monotonic
        seen = {r: ("", clock()) for r in self._others}
        last = clock()
        while not self.found and not self._ended.wait(self.interval):
            try:
                self._count += 1
                self.store.set(f"beat/{self.rank}", str(self._count))
                beats = self.store.multi_get([f"beat/{r}" for r in self._others])
                words = self.store.multi_get([f"word/{r}" for r in self._others])
                self.found = self._last_words() if any(words) else None
            except RuntimeError:
                gone = (0, "is lost, and the group's store with it")
                self.found = self._dead() or (gone if self.hosted else (self.rank, "lost its launcher"))
            if self.found:
                break
            now = clock()
            # This process itself was stopped, or the machine slept: what it did not see says nothing about others.
            forgive, last = now - last > self.timeout / 2, now
            for r, beat, word in zip(self._others, beats, words, strict=True):
                if beat != seen[r][0] or word or forgive:
                    seen[r] = (beat, now)
                elif now - seen[r][1] > self.timeout:
                    self.found = self._dead() or (r, self._end_stopped(r))
        if self.found:
            self._wind_up()

    def _last_words(self) -> tuple[int, str] | None:
        lost = None
        for r in self._others:
            word = json.loads(self.store.get(f"word/{r}") or b"{}")
            if "error" in word:
                return r, f"failed: {word['error']}"
            if "lost" in word:
                lost = (word["lost"], word["how"])
        return lost if lost and lost[0] != self.rank else None

    def _dead(self) -> tuple[int, str] | None:
        """A rank whose process is gone from this machine without a last word."""
        for r in self._others:
            if self._is_local(r) and _state(self._who[r]) in (None, "Z"):
                try:
                    word = self.store.get(f"word/{r}")
                except RuntimeError:
                    word = b""
                if not word:
                    return r, "is lost: its process died"
        return None

    def _end_stopped(self, rank: int) -> str:
        how = f"is lost: no sign of life for {self.timeout:g} s"
        if not self._is_local(rank):
            return how
        who = self._who[rank]
        if _state(who) in ("T", "t"):
            how += " (its process was stopped)"
        if _state(who) is not None:
            # On its behalf, and first: the others would see a process that died.
            self.store.set(f"word/{rank}", json.dumps({"lost": rank, "how": how}))
            with contextlib.suppress(OSError):
                os.kill(who["pid"], signal.SIGKILL)
        return how

    def _is_local(self, rank: int) -> bool:
        return bool(self._who) and self._who[rank]["host"] == socket.gethostname() and Path("/proc/self").exists()

    def _wind_up(self) -> None:
        """Give the main thread time to leave its collective, then end the process."""
        assert self.found is not None
        if self._leaving.wait(GRACE) or self._ended.is_set():
            return
        rank, how = self.found
        self.say({"lost": rank, "how": how})
        if self.first():
            print(f"error: rank {rank} {how}; every rank stops", file=sys.stderr, flush=True)
        self._leave(1)


def _state(who: dict[str, Any]) -> str | None:
    """The letter of the process's state in /proc, None when it is gone (or its number is another process's now)."""
    fields = stat_fields(who["pid"])
    return fields[0] if fields and birth(who["pid"]) == who["born"] else None
