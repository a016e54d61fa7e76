"""The server as an ASGI app: who may ask, how much, and where to look when something is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from volvelle import __version__
from volvelle.inspect import ThreadReport, live_threads
from volvelle.serve import errors, replies
from volvelle.serve.connection import BODY_SECONDS
from volvelle.serve.engine import Engine
from volvelle.serve.errors import Refused
from volvelle.serve.figures import Figures

OPEN = ("/health", "/ready")
"""Paths that want no key: what watches a server has none."""
BODY = 1 << 20
"""The largest body of a request in bytes, where nobody says otherwise."""


def create_app(
    routers: Sequence[APIRouter],
    figures: Figures,
    *,
    engine: Engine | None = None,
    api_key: str | None = None,
    body: int = BODY,
    body_seconds: float = BODY_SECONDS,
) -> FastAPI:
    """An app of these routes with limits, errors, figures and health; it starts and ends the engine."""

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        if engine is not None:
            figures.watch(engine)
            engine.start()
        yield
        if engine is not None:
            engine.close()

    app = FastAPI(title="Volvelle", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    errors.install(app)
    for router in routers:
        app.include_router(router)
    _watched(app, figures, engine)
    replies.document(app, open=OPEN, key=api_key is not None)
    app.add_middleware(Gate, figures=figures, api_key=api_key, body=body, seconds=body_seconds)
    return app


def _watched(app: FastAPI, figures: Figures, engine: Engine | None) -> None:
    began = time.monotonic()

    @app.get("/health", response_model=replies.Health)
    async def health() -> dict[str, Any]:
        """The process answers."""
        return {"status": "ok", "seconds": round(time.monotonic() - began, 3)}

    @app.get(
        "/ready",
        response_model=replies.Ready,
        responses={503: {"model": replies.Ready, "description": "The server ends"}},
    )
    async def ready() -> JSONResponse:
        """Whether texts are taken."""
        taken = engine is None or engine.alive
        return JSONResponse({"ready": taken}, 200 if taken else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text."""
        return Response(figures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/debug/threads", response_model=ThreadReport, responses=replies.failures(404))
    def threads(request: Request) -> JSONResponse:
        """Every thread of this process, for who asks from this machine."""
        if not _is_local(request.client.host if request.client else ""):
            raise Refused(404, "not found")
        return JSONResponse(dataclasses.asdict(live_threads()))


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """What every request passes: the key, the size of its body, the time it takes, and the count of its answer.

    A plain ASGI layer: it sees the body as it arrives, and the last byte of a stream.
    """

    def __init__(self, app: ASGIApp, figures: Figures, api_key: str | None, body: int, seconds: float):
        self.app, self.figures, self.body, self.seconds = app, figures, body, seconds
        self.key = None if api_key is None else f"bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, arriving = time.monotonic(), 499, Arriving(receive, self.body, self.seconds)

        async def counted(message: Message) -> None:
            nonlocal status
            if arriving.refused is not None:
                return  # whatever the app makes of a body that was cut
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, arriving, counted)
            if arriving.refused is not None and status == 499:
                raise arriving.refused
        except Refused as error:
            arriving.refused = None
            await errors.answer(error)(scope, receive, counted)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.figures.requests.labels(path, str(status)).inc()
            self.figures.seconds.labels(path).observe(time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.body:
            raise Refused(413, f"the body of {int(length):,} bytes is larger than {self.body:,}")
        if self.key is None or scope["path"] in OPEN:
            return
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        if not secrets.compare_digest(kind.lower() + b" " + key, self.key):
            raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")


class Arriving:
    """A request's body as it comes in; where it is too large or too late, the app is told that the client has gone."""

    def __init__(self, receive: Receive, most: int, seconds: float):
        self.receive, self.most, self.until = receive, most, time.monotonic() + seconds
        self.got, self.whole = 0, False
        self.refused: Refused | None = None

    async def __call__(self) -> Message:
        """The next message of the server's."""
        if self.refused is not None:
            return {"type": "http.disconnect"}
        if self.whole:
            return await self.receive()
        try:
            async with asyncio.timeout(max(0.0, self.until - time.monotonic())):
                message = await self.receive()
        except TimeoutError:
            self.refused = Refused(408, "the body did not arrive in time")
            return {"type": "http.disconnect"}
        self.got += len(message.get("body", b""))
        self.whole = not message.get("more_body", False)
        if self.got > self.most:
            self.refused = Refused(413, f"the body is larger than {self.most:,} bytes")
            return {"type": "http.disconnect"}
        return message
