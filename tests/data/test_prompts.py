"""Prompts made from docstrings and countries: different, seeded, of every kind, held out by their sources."""

from __future__ import annotations

import json

from volvelle.data import prompts
from volvelle.data.countries import Country, is_heldout
from volvelle.data.docstrings import Docstring, installed
from volvelle.data.prompts import HELD_OUT, TRAIN, varied_prompts, write_prompts
from volvelle.data.text import read_corpus

NAMES = ("Chile", "Peru", "Chad", "Mali", "Oman", "Cuba", "Fiji", "Laos", "Togo", "Iran", "Iraq", "Niue")
COUNTRIES = [Country(n, f"{n} City", "Asia", "Coin", 10**6, 10.0**4, ("en",), ()) for n in NAMES]
DOCSTRINGS = [Docstring(f"Body number {i} of a docstring with words.", f"Do thing {i}.", f"x.py:{i}") for i in range(9)]


def asked(records):
    return [record["messages"][0]["content"] for record in records]


def test_they_are_different_and_of_every_kind():
    found = asked(varied_prompts(DOCSTRINGS, COUNTRIES, 80))
    assert len(set(found)) == len(found) == 80
    for kind in ("Python function", "in plain words", "capital of", "Put these facts"):
        assert any(kind in prompt for prompt in found), kind
    assert asked(varied_prompts(DOCSTRINGS, COUNTRIES, 80)) == found
    assert found[:20] == asked(varied_prompts(DOCSTRINGS, COUNTRIES, 20))


def test_countries_are_on_one_side():
    sides = {side: asked(varied_prompts([], COUNTRIES, 500, held_out=side)) for side in (False, True)}
    for country in COUNTRIES:
        side = is_heldout(country.name)
        assert any(country.name in prompt for prompt in sides[side])
        assert not any(country.name in prompt for prompt in sides[not side])


def test_files_are_read_as_conversations(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "read_countries", lambda: COUNTRIES)
    said = write_prompts(tmp_path, 12, 5, installed(("json", "email", "ast", "wave", "csv")))
    assert said.startswith("12 to learn and 5 held out")
    for name, count in ((TRAIN, 12), (HELD_OUT, 5)):
        corpus = read_corpus(tmp_path / name)
        assert len(corpus.examples) == count
        assert all(example.messages for example in corpus.examples)
    lines = (tmp_path / TRAIN).read_text().splitlines()
    assert len({json.loads(line)["messages"][0]["content"] for line in lines}) == 12
