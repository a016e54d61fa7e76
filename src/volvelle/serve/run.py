"""uvicorn with an end that says what happened: no new texts, a while for those that are written, then an error."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import uvicorn

from volvelle.errors import VolvelleError
from volvelle.serve.connection import Connection

LEFT = 5.0
"""Seconds that connections have to take what they are told at the end."""


class Ending(Protocol):
    """What writes answers that last, and is told when the server ends: an engine, the studio's jobs."""

    def end(self, seconds: float) -> object:
        """Take nothing new, and finish within so many seconds."""
        ...


class Server(uvicorn.Server):
    """Tells the engine to end before it waits for the connections."""

    def __init__(self, config: uvicorn.Config, engine: Ending | None, grace: float):
        super().__init__(config)
        self.engine, self.grace = engine, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends gracefully, a second one at once."""
        if self.engine is not None:
            self.engine.end(0.0 if self.should_exit else self.grace)
        super().handle_exit(sig, frame)


def configure(
    app: Any, *, host: str = "127.0.0.1", port: int = 0, grace: float = 30.0, http: type[Connection] = Connection
) -> uvicorn.Config:
    """How uvicorn serves us: quietly, and with bounds on everything that a client sends or leaves lying."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=http,
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(grace + LEFT),
        timeout_keep_alive=20,
        h11_max_incomplete_event_size=64 << 10,
        limit_concurrency=1024,
        server_header=False,
    )


def serve(
    app: Any,
    host: str,
    port: int,
    *,
    engine: Ending | None = None,
    grace: float = 30.0,
    path: str = "/v1",
    ready: Callable[[str], object] = lambda url: None,
) -> int:
    """Serve until a signal; returns 0. `ready` gets the address (with `path`) before the first request is taken.

    Raises VolvelleError where the address cannot be had.
    """
    config = configure(app, host=host, port=port, grace=grace)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise VolvelleError(
            f"port {port} of {host} cannot be had: {error.strerror}", tip="port=0 takes a free one"
        ) from error
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listener.getsockname()[1]}{path}"
    print(f"{url} (Ctrl-C ends it)", flush=True)
    ready(url)
    Server(config, engine, grace).run(sockets=[listener])
    return 0
