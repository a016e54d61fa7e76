"""The figures that pages quote are those in benchmarks/results."""

from __future__ import annotations

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


def test_empty_marks_are_filled_and_nothing_else(tables):
    page = "<!-- figures: {} -->\n{}<!-- end of figures -->\nwords\n"
    both = page.format("a", "") + page.format("b", "old\n")
    assert tables.place("a").sub(lambda m: f"{m[1]}new\n{m[3]}", both) == page.format("a", "new\n") + page.format(
        "b", "old\n"
    )
    assert tables.place("b").search(both)[2] == "old"
