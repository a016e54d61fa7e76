"""The server as an ASGI app: who may ask, how much, and where to look when something is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from volvelle import __version__
from volvelle.inspect import live_threads
from volvelle.serve import errors
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
    app.add_middleware(Gate, figures=figures, api_key=api_key, body=body)
    return app


def _watched(app: FastAPI, figures: Figures, engine: Engine | None) -> None:
    began = time.monotonic()

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """The process answers."""
        return {"status": "ok", "seconds": round(time.monotonic() - began, 3)}

    @app.get("/ready", response_model=None)
    async def ready() -> JSONResponse:
        """Whether texts are taken."""
        taken = engine is None or engine.alive
        return JSONResponse({"ready": taken}, 200 if taken else 503)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Prometheus' text."""
        return Response(figures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/debug/threads", response_model=None)
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
    """What every request passes: the key, the size of its body, and the count of its answer.

    A plain ASGI layer: it sees the body as it arrives, and the last byte of a stream.
    """

    def __init__(self, app: ASGIApp, figures: Figures, api_key: str | None, body: int):
        self.app, self.figures, self.body = app, figures, body
        self.key = None if api_key is None else f"bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, got = time.monotonic(), 499, 0

        async def counted(message: Message) -> None:
            nonlocal status
            if got > self.body:
                return  # whatever the app makes of a body that was cut
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def measured() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            return message if got <= self.body else {"type": "http.disconnect"}

        try:
            self._check(scope)
            await self.app(scope, measured, counted)
            if got > self.body and status == 499:
                raise Refused(413, f"the body is larger than {self.body:,} bytes")
        except Refused as error:
            got = 0
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
