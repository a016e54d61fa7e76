"""The figures that pages quote are those in benchmarks/results."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("benchmarks.tables")
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)


def test_every_page_quotes_the_stored_figures(tables):
    for name, page in tables.PAGES.items():
        found = tables.place(name).search((ROOT / page).read_text(encoding="utf-8"))
        assert found, f"{page}: no marks for {name}"
        assert found[2] == tables.rendered(name), f"{page} is stale: python -m benchmarks.tables"


def test_a_changed_figure_is_a_changed_table(tables, monkeypatch):
    record = tables.protocol.read("language")
    before = tables.rendered("language")
    record["rows"][0]["seconds"]["ours"]["wall_median"] *= 2
    record["rows"][0]["tokens_per_second"]["ours"] *= 2
    monkeypatch.setattr(tables.protocol, "read", lambda name: record)
    assert tables.rendered("language") != before


def test_the_short_table_of_speeds_shows_ratios(tables):
    shown = tables.page_table
    every = {(row.bench, row.what): row for row in reversed(shown.rows())}
    assert set(shown.SHORT) <= set(every)
    lines = {name: shown.short(words) for name, words in (("en", shown.ENGLISH), ("zh", shown.CHINESE))}
    assert len(lines["en"]) == len(lines["zh"]) == 2 + len(shown.SHORT)
    first = every[shown.SHORT[0]]
    assert f"| {first.value:.4g}x ({first.range[0]:.2f} to {first.range[1]:.2f}) | {first.peer} |" in lines["en"][2]


def test_the_page_of_benchmarks_says_why_there_is_no_ratio(tables, monkeypatch):
    shown = tables.page_table
    first = shown.rows()[0]
    refused = dataclasses.replace(first, value=None, verdict="no ratio", why="no ratio: a|b jumped")
    monkeypatch.setattr(shown, "rows", lambda: [refused, dataclasses.replace(first, verdict="held")])
    page = shown.full(tables.PAGES)
    assert page[0] == "1 held, 1 no ratio."
    assert "| no ratio: a∣b jumped |" in page[4]
    assert page[4].startswith("| [language](language.md) |")


def test_empty_marks_are_filled_and_nothing_else(tables):
    page = "<!-- figures: {} -->\n{}<!-- end of figures -->\nwords\n"
    both = page.format("a", "") + page.format("b", "old\n")
    assert tables.place("a").sub(lambda m: f"{m[1]}new\n{m[3]}", both) == page.format("a", "new\n") + page.format(
        "b", "old\n"
    )
    assert tables.place("b").search(both)[2] == "old"
