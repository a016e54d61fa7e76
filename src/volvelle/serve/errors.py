"""Errors in OpenAI's form: {"error": {message, type, param, code}}."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from volvelle.errors import VolvelleError
from volvelle.serve.engine import Busy, Closing, Failed

KINDS = {401: "authentication_error", 404: "not_found_error", 413: "invalid_request_error", 429: "rate_limit_error"}
RETRY = {"Retry-After": "1"}


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
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else RETRY if error.status == 503 else None
        return JSONResponse(body(error.status, str(error), error.param, error.code), error.status, headers)
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
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or None
        said = str(first["msg"]).removeprefix("Value error, ")
        return JSONResponse(body(400, f"{where}: {said}" if where else said, where), 400)

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return JSONResponse(body(error.status_code, str(error.detail)), error.status_code, error.headers)

    for kind in (Refused, VolvelleError):
        app.add_exception_handler(kind, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
