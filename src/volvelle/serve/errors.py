"""Errors in OpenAI's form: {"error": {message, type, param, code}}."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from volvelle.errors import VolvelleError
from volvelle.serve.engine import Busy, Closing, Failed

KINDS = {401: "authentication_error", 404: "not_found_error", 413: "invalid_request_error", 429: "rate_limit_error"}
RETRY = {"Retry-After": "1"}
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}, 503: RETRY}


class Refused(Exception):
    """A request that is not served: the status, and what the body says."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer(error: Exception) -> JSONResponse:
    """The response to an error that we raise."""
    if isinstance(error, Refused):
        said = body(error.status, str(error), error.param, error.code)
        return JSONResponse(said, error.status, HEADERS.get(error.status))
    if isinstance(error, Busy | Closing):
        return JSONResponse(body(503, str(error), code="overloaded"), 503, RETRY)
    if isinstance(error, Failed):
        return JSONResponse(body(500, str(error)), 500)
    message = f"{error} (tip: {error.tip})" if isinstance(error, VolvelleError) and error.tip else str(error)
    return JSONResponse(body(400, message), 400)


def install(app: FastAPI) -> None:
    """Let every error leave the server in this form."""

    async def ours(_: Request, error: Exception) -> JSONResponse:
        return answer(error)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        where, said = max(((_place(one["loc"], error.body), one["msg"]) for one in error.errors()), key=_depth)
        said, place = str(said).removeprefix("Value error, "), ".".join(map(str, where)) or None
        return JSONResponse(body(400, f"{place}: {said}" if place else said, place), 400)

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return JSONResponse(body(error.status_code, str(error.detail)), error.status_code, error.headers)

    for kind in (Refused, VolvelleError):
        app.add_exception_handler(kind, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _place(loc: Sequence[Any], given: Any) -> tuple[Any, ...]:
    """Where in the body an error is, without pydantic's names for the forms that a field may have."""
    found = []
    for part in loc[1:]:
        if isinstance(given, dict | list) and isinstance(part, str) == isinstance(given, dict):
            found.append(part)
            inside = part in given if isinstance(given, dict) else part < len(given)
            given = given[part] if inside else None
    return tuple(found)


def _depth(found: tuple[Sequence[Any], str]) -> int:
    """Of the forms that a field may have, the one that fits farthest says best what is wrong."""
    return len(found[0])
