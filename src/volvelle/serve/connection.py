"""HTTP connections that wait for no client for ever: not for a request, and not for an answer to be read.

uvicorn bounds how much it holds of a request and of an answer, and how long a connection may idle between two of them.
Here are the times that it leaves open.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

BODY_SECONDS = 60.0
"""For the body of a request, from its headers on."""
SLOWEST = 1024
"""Bytes a second that a client must take of an answer, once more waits for it than the buffers hold."""


class Connection(H11Protocol):
    """A connection that is closed where its client keeps it waiting."""

    head = 20.0
    """Seconds for the headers of a request, from the connection or the answer before."""
    body = BODY_SECONDS + 5.0
    """Seconds for a body; the app answers a little earlier, and this closes where no answer comes."""
    stall = 30.0
    """Seconds between two looks at how much of an answer was taken."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        self._awaited: Any = None
        self._deadline: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing to wait for any more."""
        for timer in (self._deadline, self._look):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A trickle of bytes does not put off what the whole has to be there by."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._watch()
        self._let_go()

    def timeout_keep_alive_handler(self) -> None:
        """Close; who has not read the last answer does not keep it open."""
        super().timeout_keep_alive_handler()
        self._let_go()

    def shutdown(self) -> None:
        """The same at the server's end."""
        super().shutdown()
        self._let_go()

    def pause_writing(self) -> None:
        """The buffer is full: from now on the client has to take something."""
        super().pause_writing()
        self._look_later()

    def resume_writing(self) -> None:
        """It did."""
        if self._look is not None:
            self._look.cancel()
        super().resume_writing()

    def _watch(self) -> None:
        """Time what is awaited of the client, from when that changed."""
        state = self.conn.their_state
        if state is self._awaited:
            return
        self._awaited = state
        if self._deadline is not None:
            self._deadline.cancel()
        seconds = {h11.IDLE: self.head, h11.SEND_BODY: self.body}.get(state)
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        self.transport.close()
        self._let_go()

    def _let_go(self) -> None:
        """A closed connection waits until its answer is read; not longer than another."""
        if self.transport.is_closing():
            self._look_later()

    def _look_later(self) -> None:
        if self._look is not None:
            self._look.cancel()
        self._look = self.loop.call_later(self.stall, self._see, self.transport.get_write_buffer_size())

    def _see(self, before: int) -> None:
        if before - self.transport.get_write_buffer_size() < SLOWEST * self.stall:
            self.transport.abort()
        else:
            self._look_later()
