"""The page of all benchmarks: figures found by their place, verdicts by their bounds."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest

from volvelle.cli.verbs.bench import BENCHES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def page():
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("benchmarks.page")
    sys.path.remove(str(ROOT))
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


def ratio(value, low=0.5, high=2.0):
    return {"ratio": value, "range": [low, high]}


RECORD = {
    "machine": {"packages": {"peer": "1.2"}, "tool": "3.4: with SSE", "date": "2030-01-02T00:00:00"},
    "rows": [
        {"what": "a", "n": 1, "speed": ratio(1.5), "bytes": {"ours": 10, "peer": 40}},
        {"what": "a", "n": 2, "speed": {"ratio": None, "refused": "peer jumped"}, "share": None},
    ],
}


def line(page, *at, **more):
    return page.row_of(page.Target("bench", "what", at, **more), RECORD)


def test_a_ratio_is_held_against_its_bound_with_range_and_version(page):
    found = line(page, "rows", {"what": "a", "n": 1}, "speed", bound=1.5, peer="peer")
    assert (found.verdict, found.figure, found.peer, found.target) == (
        "held", "1.5 (0.50 to 2.00)", "peer 1.2", ">= 1.5 x",
    )  # fmt: skip
    assert line(page, "rows", {"what": "a", "n": 1}, "speed", bound=1.51).verdict == "NOT held"
    assert line(page, "rows", {"what": "a", "n": 1}, "speed").verdict == "no target"
    assert line(page, "rows", {"n": 1}, "speed", peer="tool, fast").peer == "tool, fast 3.4"


def test_at_most_and_a_share_of_another_figure(page):
    place = {"at": ("rows", {"n": 1}, "bytes", "ours"), "over": ("rows", {"n": 1}, "bytes", "peer"), "most": True}
    found = page.row_of(page.Target("bench", "what", bound=0.25, **place), RECORD)
    assert (found.value, found.verdict, found.target) == (0.25, "held", "<= 0.25 x")
    assert page.row_of(page.Target("bench", "what", bound=0.24, **place), RECORD).verdict == "NOT held"


@pytest.mark.parametrize("place", [("speed",), ("share",)])
def test_a_refused_ratio_is_no_verdict(page, place):
    found = line(page, "rows", {"n": 2}, *place, bound=1.0)
    assert found.verdict == "no ratio"
    assert found.figure.startswith("no ratio: ")


@pytest.mark.parametrize("place", [("rows", {"n": 3}, "speed"), ("rows", {"n": 1}, "none"), ("none",)])
def test_what_is_not_there_was_not_measured(page, place):
    assert line(page, *place, bound=1.0).verdict == "not measured yet"
    assert page.row_of(page.Target("bench", "what", place, bound=1.0), {}).verdict == "not measured yet"


def test_nan_never_holds(page):
    for most in (False, True):
        assert page.verdict(math.nan, page.Target("bench", "what", (), bound=1.0, most=most)) == "NOT held"


def test_every_benchmark_with_a_ratio_has_a_line(page):
    facts_only = {"positions"}
    assert {target.bench for target in page.TARGETS} == {bench.name for bench in BENCHES} - facts_only


def test_lines_name_figures_that_the_stored_results_have(page):
    """A typing error in a place would read as "not measured yet": every stored benchmark has most of its lines."""
    every = page.rows()
    for name in {row.bench for row in every}:
        own = [row for row in every if row.bench == name]
        if page.protocol.read(name):
            assert sum(row.verdict != "not measured yet" for row in own) >= len(own) / 2, name
    assert len({(row.bench, row.what, row.peer) for row in every}) == len(every)


def test_the_exit_code_says_whether_all_targets_held(page, monkeypatch, capsys):
    for speed, code in ((9.0, 0), (0.1, 1)):
        monkeypatch.setattr(page, "TARGETS", (page.Target("b", "w", ("speed",), bound=1.0),))
        monkeypatch.setattr(page, "rows", lambda speed=speed: [page.row_of(page.TARGETS[0], {"speed": speed})])
        assert page.main(["--json"]) == code
        assert json.loads(capsys.readouterr().out)["rows"][0]["value"] == speed
        assert page.main([]) == code
        assert "1 " + ("held" if code == 0 else "NOT held") in capsys.readouterr().out
