"""The page of claims shows every claim, also those without figures and those that did not hold."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

from volvelle.claims import claim as frame


@pytest.fixture
def table(monkeypatch, repository):
    monkeypatch.syspath_prepend(str(repository))
    yield importlib.import_module("benchmarks.support.claims_table")
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)


def stored(repository, name="rf"):
    return json.loads((repository / "benchmarks" / "results" / "claims" / f"{name}.json").read_text())


def test_the_pages_are_fresh(table, repository):
    places = {
        "docs/claims.md": ("claims", table.page()),
        "README.md": ("short claims", table.short(table.ENGLISH)),
        "README.zh-CN.md": ("short claims in Chinese", table.short(table.CHINESE)),
    }
    for page, (name, lines) in places.items():
        expected = f"<!-- figures: {name} -->\n" + "\n".join(lines) + "\n<!-- end of figures -->"
        assert expected in (repository / page).read_text(encoding="utf-8"), f"{page}: run python -m benchmarks.tables"


def test_every_claim_has_its_section_and_row(table):
    lines = table.page()
    for name, claim in frame.catalogue():
        assert f"### {name}" in lines
        assert f"> {claim.sentence}" in lines
        assert any(line.startswith(f"| [{name}](#{name}) |") for line in lines)


def test_every_record_belongs_to_a_claim(repository):
    files = (repository / "benchmarks" / "results" / "claims").glob("*.json")
    assert {path.stem for path in files} <= set(frame.names())


def test_the_short_table_has_eight_claims_of_eight_families(table):
    assert len(table.short(table.ENGLISH)) == 2 + 8
    assert len({claim.family for name, claim in frame.catalogue() if name in table.SHORT}) == 8


def test_a_claim_without_figures_is_listed_as_such(table, tmp_path):
    lines = table.page(tmp_path)
    assert lines[0] == f"{len(frame.names())} claims: {len(frame.names())} not measured yet."
    assert sum("| not measured yet |" in line for line in lines) == len(frame.names())


def test_a_bound_that_did_not_hold_comes_first_and_is_counted(table, repository, tmp_path):
    record = stored(repository)
    judged = [finding for finding in record["findings"] if finding["held"] is not None]
    judged[-1] |= {"what": "the | last", "held": False}
    record["verdict"] = "not held"
    (tmp_path / "rf.json").write_text(json.dumps(record))
    lines = table.page(tmp_path)
    head = lines.index("| measured | figure | bound | held |")
    assert lines[head + 2].startswith("| the ∣ last |")
    assert lines[head + 2].endswith("| no |")
    assert f"{len(judged) - 1} of {len(judged)}" in next(line for line in lines if line.startswith("| [rf]"))


def test_what_the_page_shows_is_the_record(table, repository, tmp_path):
    record = stored(repository) | {"peers": {"a peer": "1.2.3"}, "why": "no second machine", "notes": ["mind this"]}
    (tmp_path / "rf.json").write_text(json.dumps(record))
    text = "\n".join(table.page(tmp_path))
    for shown in ("a peer 1.2.3", "(no second machine)", "- mind this", record["machine"]["torch"], "rf-fields.svg"):
        assert shown in text
    for key in record["setting"]:
        assert f"{key}: " in text


def test_pictures_that_the_page_shows_are_there(table, repository):
    for name, _, record in table.found():
        for title in record["pictures"] if record else ():
            assert (repository / "benchmarks" / "results" / "claims" / f"{name}-{title}.svg").is_file()
