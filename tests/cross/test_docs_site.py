"""The pages as a site: all of them in the menu, nothing loaded from elsewhere, and faults are found."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture
def tool(repository):
    spec = importlib.util.spec_from_file_location("docs_site", repository / "tools" / "docs_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_stands_in_the_menu_once(tool):
    entries = [entry for family in tool.navigation() for names in family.values() for entry in names]
    named = [next(iter(entry.values())) if isinstance(entry, dict) else entry for entry in entries]
    assert sorted(named) == sorted(page.as_posix() for page in tool.pages())


def test_pages_keep_their_places_and_lose_the_words_of_our_tests(tool, tmp_path):
    tool.lay_out(tmp_path)
    assert (tmp_path / "docs" / "claims.md").is_file()
    assert (tmp_path / "benchmarks" / "results" / "claims" / "rf-fields.svg").is_file()
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "```console\n$ volvelle generate" in text
    assert "```console slow" not in text


def test_a_link_that_leads_nowhere_is_named(tool, tmp_path, monkeypatch):
    (tmp_path / "one.md").write_text("[there](one.md) `[no](link)` [gone](two.md)\n")
    monkeypatch.setattr(tool, "REPOSITORY", tmp_path)
    with pytest.raises(SystemExit, match=r"one\.md links to two\.md"):
        tool.lay_out(tmp_path / "out")


@pytest.mark.parametrize(
    ("html", "loads"),
    [
        ('<script src="https://a.example/x.js">', True),
        ("<img src=//a.example/x.png>", True),
        ('<link rel="stylesheet" href="http://a.example/x.css">', True),
        ('<a href="https://a.example/">a link</a>', False),
        ('<script src="assets/x.js"></script><svg xmlns="http://www.w3.org/2000/svg">', False),
    ],
)
def test_what_another_machine_would_be_asked_for_is_found(tool, tmp_path, html, loads):
    (tmp_path / "page.html").write_text(html)
    assert bool(tool.loads_from_elsewhere(tmp_path)) is loads


@pytest.mark.slow
def test_the_site_builds(tool, tmp_path, monkeypatch):
    pytest.importorskip("zensical", reason="the extra docs is not installed")
    monkeypatch.setattr("sys.argv", ["docs_site.py", str(tmp_path / "site")])
    assert tool.main() == 0
    assert len(list(Path(tmp_path, "site", "site").rglob("*.html"))) >= len(tool.pages())


@pytest.mark.slow
def test_the_build_refuses_an_anchor_that_is_not_there(tool, tmp_path, monkeypatch):
    pytest.importorskip("zensical", reason="the extra docs is not installed")
    (tmp_path / "README.md").write_text("# One\n\n[nowhere](docs/two.md#nowhere)\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "two.md").write_text("# Two\n")
    monkeypatch.setattr(tool, "REPOSITORY", tmp_path)
    monkeypatch.setattr("sys.argv", ["docs_site.py", str(tmp_path / "site")])
    assert tool.main() != 0
