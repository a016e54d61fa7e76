"""The page's own files: a fixed list, read once, each with its type and a tag by which a browser asks again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from volvelle.serve.errors import Refused

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class File:
    """One file of the page."""

    content: bytes
    kind: str
    tag: str


def read_files() -> dict[str, File]:
    """Every file under static/ by its path: "main.js", "rooms/runs.js"."""
    found: dict[str, File] = {}

    def walk(folder: Traversable, before: str) -> None:
        for entry in folder.iterdir():
            suffix = f".{entry.name.rpartition('.')[2]}"
            if entry.is_dir():
                walk(entry, f"{before}{entry.name}/")
            elif suffix in TYPES:
                content = entry.read_bytes()
                tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
                found[f"{before}{entry.name}"] = File(content, TYPES[suffix], tag)

    walk(files("volvelle.serve.studio") / "static", "")
    return found


def page_routes(known: Mapping[str, File] | None = None) -> APIRouter:
    """The page at / and its files under /static/. A path is looked up in the list and never opens anything."""
    listed = read_files() if known is None else known
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page(request: Request) -> Response:
        return _answer(request, listed["index.html"])

    @router.get("/favicon.ico")
    async def icon(request: Request) -> Response:
        return _answer(request, listed["mark.svg"])

    @router.get("/static/{path:path}")
    async def static(path: str, request: Request) -> Response:
        if path not in listed:
            raise Refused(404, f"the page has no file {path!r}")
        return _answer(request, listed[path])

    return router


def _answer(request: Request, file: File) -> Response:
    headers = {"ETag": file.tag, "Cache-Control": "no-cache"}
    if file.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.kind, headers=headers)
