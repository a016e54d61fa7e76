"""Prompts of several kinds for a chat model to answer: questions, code, rewriting, summaries, facts to put into words.

Made from what every machine has or can fetch, the docstrings of its Python packages and a table of countries. They are
for training that learns a model's own answers: the answer that a record holds is only what the prompt was made from.
Held-out prompts come from other packages and other countries than those to learn from.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from volvelle.data.countries import Country, country_examples, is_heldout, read_countries
from volvelle.data.docstrings import Docstring, Docstrings, Package, collect
from volvelle.errors import VolvelleError
from volvelle.files import write_atomic

TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"

OF_SUMMARIES = (
    "Write a Python function for this: {summary}",
    "Write a short Python class whose docstring begins: {summary} Show how it is used.",
    "Explain to a beginner what this line of documentation means: {summary}",
    "Give three examples of when one would need code that does this: {summary}",
)
OF_BODIES = (
    "Summarise this text in one sentence:\n\n{body}",
    "Rewrite this text in plain words:\n\n{body}",
    "Correct the grammar and spelling of this text, and change nothing else:\n\n{body}",
    "List the main points of this text:\n\n{body}",
    "Write three questions that this text answers:\n\n{body}",
)
OF_COUNTRIES = (
    "What is the capital of {name}?",
    "Tell me three interesting facts about {name}.",
    "Plan two days in {capital}.",
    "Write a short story that takes place in {capital}.",
    "How would you explain to a child where {name} lies?",
    "Write a friendly letter to someone who is about to move to {name}.",
)
OF_ROWS = ("Put these facts into a sentence: {row}", "Write a sentence that says this: {row}")

Record = dict[str, object]


def varied_prompts(
    docstrings: Sequence[Docstring], countries: Sequence[Country], count: int, *, held_out: bool = False
) -> list[Record]:
    """Return up to `count` different one-turn conversations, the kinds in turn; `held_out` takes the other countries.

    The result depends on nothing but the arguments.

    >>> one = Docstring("Reads a file and returns its lines, without the newlines.", "Read all lines.", "x.py:1")
    >>> varied_prompts([one], [], 1)[0]["messages"][0]["content"]
    'Write a Python function for this: Read all lines.'
    """
    chooser = random.Random(f"prompts/{held_out}")
    texts = chooser.sample(list(docstrings), len(docstrings))
    own = [c for c in countries if is_heldout(c.name) == held_out and c.capital]
    rows = country_examples(countries, split="heldout" if held_out else "train", per_country=8)
    kinds: list[list[Record]] = [
        _filled(OF_SUMMARIES, texts, lambda text, one: text.format(summary=one.summary), lambda one: one.body),
        _filled(OF_COUNTRIES, own, lambda text, c: text.format(name=c.name, capital=c.capital), lambda c: c.capital),
        _filled(OF_BODIES, texts[::-1], lambda text, one: text.format(body=one.body), lambda one: one.summary),
        _filled(OF_ROWS, rows, lambda text, row: text.format(row=row["prompt"]), lambda row: row["completion"].strip()),
    ]
    found: list[Record] = []
    for turn in range(max(map(len, kinds), default=0)):
        found += [kind[turn] for kind in kinds if turn < len(kind)]
        if len(found) >= count:
            break
    return found[:count]


def _filled(texts: Sequence[str], items: Sequence, fill: Callable, answer: Callable) -> list[Record]:
    """Every item in one of the texts first, in the next one of them then, so that few items make many prompts too."""
    found: dict[str, Record] = {}
    for shift in range(len(texts)):
        for number, item in enumerate(items):
            prompt = fill(texts[(number + shift) % len(texts)], item)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer(item)}]
            found.setdefault(prompt, {"messages": messages})
    return list(found.values())


def write_prompts(
    folder: str | os.PathLike[str],
    count: int,
    held_out: int,
    packages: Sequence[Package],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Write train.jsonl and held_out.jsonl, of up to that many prompts; returns what they were made from.

    Without the table of countries, which is fetched once, there are no questions and no facts.
    """
    docstrings: Docstrings = collect(packages, progress=progress)
    try:
        countries, table = read_countries(), "a table of countries"
    except VolvelleError as error:
        countries, table = [], f"no table of countries ({error})"
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    sides = (
        (TRAIN, varied_prompts(docstrings.train, countries, count)),
        (HELD_OUT, varied_prompts(docstrings.held_out, countries, held_out, held_out=True)),
    )
    for name, records in sides:
        write_atomic(path / name, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    many = " and ".join(f"{len(records):,} {'held out' if name == HELD_OUT else 'to learn'}" for name, records in sides)
    return f"{many} prompts made from {docstrings} and {table}"
