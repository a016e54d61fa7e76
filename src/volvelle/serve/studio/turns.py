"""One heavy request at a time in a room, a few that wait, and no more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from volvelle.serve.engine import Busy


class Turns:
    """Turns of one room: `check` before the answer begins, `take` around the work."""

    def __init__(self, room: str, *, waiting: int = 4):
        self.room, self.waiting = room, waiting
        self._lock, self._count = asyncio.Lock(), 0

    def check(self) -> None:
        """Raise Busy when as many requests wait as may."""
        if self._count > self.waiting:
            raise Busy(f"{self.room}: {self._count} requests are being answered or wait already")

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Wait for one's turn, and hold it. Raises Busy as `check` does."""
        self.check()
        self._count += 1
        try:
            async with self._lock:
                yield
        finally:
            self._count -= 1
