"""The catalogue and a page a technique: entry, formulas, code, and what its claim was found to be."""

from __future__ import annotations

import ast
import functools
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse

from volvelle.claims.claim import load
from volvelle.cli.catalogue import PACKAGE
from volvelle.serve.errors import Refused
from volvelle.serve.studio import catalogue
from volvelle.serve.studio.catalogue import Entry
from volvelle.serve.studio.documents import blocks, coloured, formulas
from volvelle.serve.studio.verdicts import Found, Verdicts, this_machine

PICTURE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
INSTRUMENTS = {
    "rf": "inspect/field",
    "dilation": "inspect/field",
    "compound-scaling": "inspect/field",
    "memory": "inspect/memory",
    "rope": "inspect/positions",
    "position-zoo": "inspect/positions",
    "mtp": "chat",
}
"""The room with the live instrument of a technique, by its key or its family."""
FAMILY_INSTRUMENTS = {
    "decode": "chat",
    "segmentation": "vision",
    "detection": "vision",
    "position": "inspect/positions",
    "collectives": "inspect/ring",
}


def router(verdicts: Verdicts) -> APIRouter:
    """The routes of the catalogue."""
    router = APIRouter(prefix="/studio/api/techniques")

    @router.get("")
    def listed() -> dict[str, Any]:
        """Every card, newest paper first."""
        found = catalogue.entries()
        return {
            "techniques": [card(entry, verdicts.best(entry.claim)) for entry in found],
            "families": catalogue.families(found),
            "machine": this_machine(),
        }

    @router.get("/source")
    def source(file: str) -> dict[str, Any]:
        """A part's code as coloured pieces; `file` is one of the catalogue's."""
        pieces = _sources().get(file)
        if pieces is None:
            raise Refused(404, f"the catalogue has no file {file!r}", param="file")
        return {"file": file, "pieces": coloured(pieces)}

    @router.get("/{key}")
    def page(key: str) -> dict[str, Any]:
        """All of one technique."""
        entry = catalogue.find(key)
        if entry is None:
            raise Refused(404, f"the catalogue has no technique {key!r}")
        kin = [one for one in catalogue.entries() if one.claim == entry.claim and one.key != key and entry.claim]
        return {
            **card(entry, verdicts.best(entry.claim)),
            "where": entry.where,
            "names": entry.names,
            "recipe": entry.recipe,
            "files": [_file(name) for name in entry.files],
            "claim": None if entry.claim is None else claim(entry.claim, verdicts),
            "kin": [{"key": one.key, "title": one.title} for one in kin],
            "instrument": INSTRUMENTS.get(key) or FAMILY_INSTRUMENTS.get(entry.family),
        }

    @router.get("/{key}/pictures/{number}")
    def picture(key: str, number: int, own: bool = False) -> FileResponse:
        """A picture that the technique's claim drew, by its place in the record."""
        entry = catalogue.find(key)
        found = [one for one in verdicts.of(entry.claim) if one.own == own] if entry and entry.claim else []
        titles = found[0].record.get("pictures", ()) if found else ()
        path = found[0].picture(titles[number]) if 0 <= number < len(titles) else None
        if path is None:
            raise Refused(404, f"{key} has no picture {number}")
        return FileResponse(path, media_type="image/svg+xml", headers={"Content-Security-Policy": PICTURE_POLICY})

    return router


def card(entry: Entry, found: Found | None) -> dict[str, Any]:
    """What a card shows, and what a search looks through."""
    paper = entry.paper
    return {
        "key": entry.key,
        "title": entry.title,
        "summary": entry.summary,
        "summary_zh": entry.summary_zh,
        "family": entry.family,
        "year": entry.year,
        "authors": paper.authors if paper else None,
        "paper": paper.title if paper else None,
        "url": entry.url,
        "words": " ".join(name.partition(".")[2] for name in entry.names),
        "claimed": entry.claim,
        "found": None if found is None else found.short(),
    }


def claim(name: str, verdicts: Verdicts) -> dict[str, Any]:
    """A claim's sentence and every record of it, this machine's first."""
    told = load(name).CLAIM
    found = sorted(verdicts.of(name), key=lambda one: (not one.here, not one.own))
    return {
        "name": name,
        "sentence": told.sentence,
        "paper": str(told.paper),
        "measured_by": told.measured_by,
        "seconds": dict(told.seconds),
        "records": [{**one.record, **one.short()} for one in found],
    }


def _file(name: str) -> dict[str, Any]:
    tree = ast.parse(_sources()[name])
    return {
        "file": name,
        "formulas": formulas(tree) if name.startswith("parts/") else [],
        "text": [block._asdict() for block in blocks(ast.get_docstring(tree) or "")],
        "lines": _sources()[name].count("\n"),
    }


@functools.cache
def _sources() -> dict[str, str]:
    """The source of every file that may be shown; nothing else is ever read for a request."""
    files = {file for entry in catalogue.entries() for file in entry.files}
    return {file: (PACKAGE / file).read_text(encoding="utf-8") for file in sorted(files)}
