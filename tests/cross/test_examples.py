"""Every command that help texts, claims and pages show is one that the command line takes: verb, options and values."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from volvelle.claims.claim import catalogue
from volvelle.cli.main import choose
from volvelle.cli.options import parse
from volvelle.cli.table import available
from volvelle.errors import UsageError

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
FENCE = re.compile(r"^```console(?P<words>[^\n]*)\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(volvelle [a-z][^`]*)`")
SHELL = {"|", "&&", ";", ">", "2>&1", "&", "||"}


def taken(line: str) -> None:
    """Raise UsageError where the command line would refuse `volvelle …` before it begins to work."""
    words = shlex.split(line)[1:]
    words = words[: next((i for i, word in enumerate(words) if word in SHELL), len(words))]
    words = [word for word in words if word != "--json"]
    if words in ([], ["--help"]) or words[-1] == "--help":
        return
    verb, rest = choose(words)
    assert verb is not None
    parse(importlib.import_module(verb.module).Options, rest, verb=verb.name)


def shown_in(text: str) -> list[str]:
    """Commands in a page's console fences, but for those that are meant to fail."""
    found = []
    for match in FENCE.finditer(text):
        body = re.sub(r"\\\n", " ", match["body"])
        lines = [line[2:] for line in body.splitlines() if line.startswith("$ ")]
        if "fails" in match["words"].split():
            lines = lines[:-1]
        found += [line for line in lines if line.startswith("volvelle ")]
    return found


def named_in(text: str) -> list[str]:
    """Commands in a page's inline code. They may leave out what is required: `volvelle train gan` names a verb."""
    found = []
    inline = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for line in INLINE.findall(inline):
        line = " ".join(line.split())
        if not re.search(r"…|\.\.\.|\b[A-Z]{3,}\b|\||<", line):  # a pattern, not a command
            found.append(line)
    return found


@pytest.mark.parametrize("verb", available(), ids=lambda verb: verb.name)
def test_a_verbs_examples_are_taken(verb):
    module = importlib.import_module(verb.module)
    for line in module.EXAMPLES:
        assert choose(shlex.split(line)[1:])[0] == verb
        taken(line)


def test_recipes_of_claims_are_taken():
    for name, claim in catalogue():
        if claim.recipe and "…" not in claim.recipe:
            try:
                taken(claim.recipe)
            except UsageError as error:
                pytest.fail(f"{name}: {claim.recipe}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_commands_of_the_page_are_taken(page):
    text = page.read_text(encoding="utf-8")
    shown = shown_in(text)
    for line in [*shown, *named_in(text)]:
        try:
            taken(line)
        except UsageError as error:
            if line in shown or not re.search(r": missing | what\? One of:", str(error)):
                pytest.fail(f"{page.name}: {line}: {error}")


@pytest.mark.parametrize("line", ["volvelle genrate x", "volvelle plan smollm2 bacth=8", "volvelle ls modles"])
def test_a_wrong_command_is_found(line):
    with pytest.raises(UsageError):
        taken(line)
    assert shown_in(f"```console\n$ {line}\n```\n") == named_in(f"As in `{line}`.") == [line]
