"""The studio's app: the page and its files, the rooms' routes, and who may ask.

The studio is for the person at this machine. Beside binding to loopback it refuses what a page from elsewhere could
send through that person's browser: another Host than this machine's (DNS rebinding), and changes from another origin.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from fastapi import APIRouter, FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from volvelle.serve import errors
from volvelle.serve.app import create_app
from volvelle.serve.errors import Refused
from volvelle.serve.figures import Figures
from volvelle.serve.studio.files import page_routes

BODY = 32 << 20
"""The largest body of a request in bytes: a picture."""
HOSTS = ("127.0.0.1", "localhost", "::1")
READS = ("GET", "HEAD", "OPTIONS")
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""What the page may load: this server's files, and pictures that its own scripts made."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def create_studio(rooms: Sequence[APIRouter] = (), *, figures: Figures | None = None, body: int = BODY) -> FastAPI:
    """An app of these rooms and the page over them.

    A room is a router under /studio/api/NAME/ and a module static/rooms/NAME.js. What a room starts and ends with the
    studio is its router's `lifespan`.
    """
    app = create_app([*rooms, page_routes()], figures or Figures(), body=body)
    app.add_middleware(Guard)
    return app


class Guard:
    """Refuses other hosts and other origins, and says on every answer what a browser may do with it."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            check_origin(scope["method"], Headers(scope=scope))
        except Refused as error:
            await errors.answer(error)(scope, receive, marked)
            return
        await self.app(scope, receive, marked)


def check_origin(method: str, headers: Headers) -> None:
    """Raise Refused for a host that is not this machine, and for a change that another origin asks for."""
    host = headers.get("host", "")
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if name not in HOSTS:
        raise Refused(421, f"the studio answers to {', '.join(HOSTS)} only, not to the host {host!r}")
    if method in READS:
        return
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
    if (origin is not None and origin != f"http://{host}") or site not in ("same-origin", "none"):
        raise Refused(403, f"only the studio's own page may change anything, not {origin or site}")
