"""The catalogue: every technique once, from its claim's entry or, without one, from its part's own words."""

from __future__ import annotations

import ast
import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from volvelle.claims.claim import Claim
from volvelle.claims.claim import catalogue as claims
from volvelle.cli.catalogue import PACKAGE, Technique
from volvelle.cli.catalogue import techniques as parts
from volvelle.serve.studio.documents import Paper, first_sentence, paper_of, title_of

KIN = {"adversarial": "generation", "transport": "generation", "lowrank": "adapt"}
"""Folders of parts whose techniques the claims list under another family."""
FOCUS = 3
"""A claim over more part files than this compares techniques; each of them keeps a card of its own."""


@dataclass(frozen=True)
class Entry:
    """One card: a technique with its family, paper, parts and claim."""

    key: str
    title: str
    family: str
    summary: str
    summary_zh: str | None
    paper: Paper | None
    url: str | None
    where: str | None
    files: tuple[str, ...]
    names: tuple[str, ...]
    """Public names that implement it: functional.apply_rope."""
    claim: str | None
    """Its own claim, or the first that measures it among others."""
    recipe: str | None

    @property
    def year(self) -> int:
        """The paper's year; 0 without a paper."""
        return self.paper.year if self.paper else 0


@functools.cache
def entries() -> tuple[Entry, ...]:
    """All techniques, newest paper first."""
    known, listed = parts(), list(claims())
    homes = {name: part for part in known for name in part.names}
    uses = {name: tuple(dict.fromkeys(homes[n].file for n in claim.parts if n in homes)) for name, claim in listed}
    told = {file for files in uses.values() if len(files) <= FOCUS for file in files}
    found = [_of_claim(name, claim, uses[name]) for name, claim in listed]
    for part in known:
        if part.file not in told:
            found.append(_of_part(part, next((name for name, files in uses.items() if part.file in files), None)))
    return tuple(sorted(found, key=lambda entry: (-entry.year, entry.title.lower())))


def find(key: str) -> Entry | None:
    """A technique by its key."""
    return next((entry for entry in entries() if entry.key == key), None)


def families(among: Sequence[Entry]) -> list[tuple[str, int]]:
    """The families and how many techniques each has, by name."""
    return sorted(Counter(entry.family for entry in among).items())


def _of_claim(name: str, claim: Claim, files: tuple[str, ...]) -> Entry:
    paper = Paper(claim.paper.authors, claim.paper.year, claim.paper.title)
    return Entry(
        key=name,
        title=claim.title,
        family=claim.family,
        summary=claim.summary,
        summary_zh=claim.summary_zh,
        paper=paper,
        url=claim.paper.url,
        where=claim.paper.where,
        files=(*files, _file_of(name)),
        names=claim.parts,
        claim=name,
        recipe=claim.recipe,
    )


def _of_part(part: Technique, claim: str | None) -> Entry:
    tree = ast.parse((PACKAGE / part.file).read_text(encoding="utf-8"))
    text = ast.get_docstring(tree) or ""
    title, said = title_of(text)
    public = {name.partition(".")[2] for name in part.names}
    defined = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in public)
    stem = Path(part.file).stem
    # The definition that bears the file's name says best what the file is.
    documents = map(ast.get_docstring, sorted(defined, key=lambda node: stem not in node.name))
    summary = said or next((first_sentence(one) for one in documents if one), "")
    key = f"{Path(part.file).parent.name}.{stem}"
    return Entry(
        key=key,
        title=title,
        family=KIN.get(part.family, part.family),
        summary=_sentence(summary.removeprefix("Return ")),
        summary_zh=_chinese().get(key),
        paper=paper_of(text),
        url=None,
        where=None,
        files=(part.file,),
        names=part.names,
        claim=claim,
        recipe=None,
    )


def _sentence(text: str) -> str:
    word = text.partition(" ")[0]
    return f"{text}." if len(word) < 2 or not word.isalpha() else f"{text[:1].upper()}{text[1:]}."


@functools.cache
def _chinese() -> dict[str, str]:
    """Summaries in Chinese of the parts without a claim; a claim brings its own."""
    return json.loads((files("volvelle.serve.studio") / "chinese.json").read_text(encoding="utf-8"))


def _file_of(claim: str) -> str:
    return f"claims/{claim.replace('-', '_')}.py"
