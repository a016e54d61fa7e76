"""The Runs room: the run folders of this place, their curves as they grow, their pictures and reports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse

from volvelle.errors import VolvelleError
from volvelle.runs import RunFolder, scan
from volvelle.serve.errors import Refused
from volvelle.serve.studio.techniques import PICTURE_POLICY

PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}
SHOWN = 60
"""Pictures of a run that its page shows, the last ones."""
DEPTH = 3
CHUNK = 1 << 20
"""Bytes of metrics.jsonl that one answer holds at most."""
TAIL = 1 << 14
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
"""A report is one file without scripts; a browser that shows it here runs none, whoever wrote it."""
ASIDE = ("data", "weights", "adapter", "checkpoints")
"""Folders of a run whose pictures are no results."""


def router(root: Path) -> APIRouter:
    """The room's routes over the runs in `root`."""
    router = APIRouter(prefix="/studio/api/runs")

    def opened(name: str) -> RunFolder:
        """A run by its name, which is compared with those that are there and opens nothing itself."""
        found = next((run for run in scan(root) if run.path.name == name), None)
        if found is None:
            raise Refused(404, f"there is no run {name!r} in {root}/")
        return found

    @router.get("")
    def listed() -> dict[str, Any]:
        """Every run, newest first."""
        return {"root": str(root), "runs": [_row(run) for run in reversed(scan(root))]}

    @router.get("/{name}")
    def page(name: str) -> dict[str, Any]:
        """A run without its figures."""
        run = opened(name)
        try:
            config = run.config()
        except VolvelleError as error:
            config = {"not readable": str(error)}
        return {
            **_row(run),
            "config": config,
            "environment": _json(run.path / "env.json"),
            "samples": _json(run.path / "samples.json"),
            "pictures": [path.relative_to(run.path).as_posix() for path in _pictures(run.path)],
            "folder": str(run.path),
        }

    @router.get("/{name}/metrics")
    def metrics(name: str, offset: int = 0) -> dict[str, Any]:
        """What was logged from a byte on, and where to go on; a last line that is not whole yet is left for later."""
        run = opened(name)
        records, after, began = read_metrics(run.path / "metrics.jsonl", offset)
        return {"records": records, "offset": after, "began": began, "status": run.status, "last": _last(run.path)}

    @router.get("/{name}/pictures/{number}")
    def picture(name: str, number: int) -> FileResponse:
        """A picture of a run, by its place in the list."""
        found = _pictures(opened(name).path)
        if not 0 <= number < len(found):
            raise Refused(404, f"{name} has no picture {number}")
        kind = PICTURES[found[number].suffix.lower()]
        return FileResponse(found[number], media_type=kind, headers={"Content-Security-Policy": PICTURE_POLICY})

    @router.get("/{name}/report")
    def report(name: str) -> FileResponse:
        """The run's report, as a page that may run nothing and load nothing."""
        path = opened(name).path / "report.html"
        if not _plain_file(path):
            raise Refused(404, f"{name} has no report yet")
        return FileResponse(path, media_type="text/html", headers={"Content-Security-Policy": REPORT_POLICY})

    return router


def read_metrics(path: Path, offset: int) -> tuple[list[dict[str, Any]], int, int]:
    """The records from a byte on, where the next ones will begin, and where these did.

    Whole lines only: one that is being written is read the next time. A file that became shorter was written anew and
    is read from its beginning. A line that is no JSON object is passed over: the run's own reader complains of it.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            began = offset if 0 <= offset <= size else 0
            file.seek(began)
            content = file.read(CHUNK)
    except FileNotFoundError:
        return [], 0, 0
    whole = content[: content.rfind(b"\n") + 1]
    records = [record for line in whole.splitlines() if (record := _object(line)) is not None]
    return records, began + len(whole), began


def _row(run: RunFolder) -> dict[str, Any]:
    manifest = run.manifest
    return {
        "name": run.path.name,
        "kind": manifest.get("kind"),
        "status": run.status,
        "base": manifest.get("base_model"),
        "created": manifest.get("created"),
        "ended": manifest.get("ended"),
        "last": _last(run.path),
        "report": _plain_file(run.path / "report.html"),
    }


def _last(folder: Path) -> dict[str, Any]:
    """The newest value of everything that was logged near the end."""
    path = folder / "metrics.jsonl"
    try:
        size = path.stat().st_size
    except OSError:
        return {}
    records, _, _ = read_metrics(path, max(size - TAIL, 0))
    merged: dict[str, Any] = {}
    for record in records:
        merged |= record
    merged.pop("event", None)
    return merged


def _pictures(folder: Path) -> list[Path]:
    """The pictures that a run made, by name, which numbers those of a series; links are not followed."""

    def walk(inside: Path, depth: int) -> Iterator[Path]:
        for path in sorted(inside.iterdir()):
            if path.is_symlink():
                continue
            if path.is_dir() and depth and path.name not in ASIDE:
                yield from walk(path, depth - 1)
            elif path.suffix.lower() in PICTURES and path.is_file():
                yield path

    return list(walk(folder, DEPTH))[-SHOWN:]


def _plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
    except (OSError, ValueError):
        return None


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line, parse_constant=str)  # NaN is no JSON, and no answer of ours may hold it
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
