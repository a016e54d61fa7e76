"""The measuring protocol: rounds are interleaved, and a restless baseline gives no ratio."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "protocol.py"


@pytest.fixture(scope="module")
def protocol():
    spec = importlib.util.spec_from_file_location("benchmark_protocol", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_rounds_are_interleaved_in_turning_order(protocol):
    calls = []
    series = protocol.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert len(series["a"].wall) == len(series["b"].cpu) == 3


def test_a_round_of_several_passes_counts_their_mean(protocol, monkeypatch):
    taken, now, calls = {"a": iter([1.0, 3.0, 2.0, 6.0]), "b": iter([5.0, 5.0, 7.0, 7.0])}, [0.0], []
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: now[0])

    def work(name):
        calls.append(name)
        now[0] += next(taken[name])

    variants = {"a": lambda: work("a"), "b": lambda: work("b")}
    series = protocol.interleave(variants, rounds=2, warmup=0, passes=2)
    assert "".join(calls) == "ab" + "ba" + "ab" + "ba"
    assert series["a"].wall == pytest.approx([2.0, 4.0])
    assert series["b"].wall == pytest.approx([5.0, 7.0])


def test_short_calls_are_repeated_and_their_mean_counts(protocol, monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: now[0])

    def work(name, seconds):
        calls.append(name)
        now[0] += seconds

    variants = {"a": lambda: work("a", 0.25), "b": lambda: work("b", 2.0)}
    series = protocol.interleave(variants, rounds=1, warmup=1, lasting=1.0)
    assert "".join(calls) == "ab" + "aaaab"
    assert series["a"].wall == pytest.approx([0.25])
    assert series["b"].wall == pytest.approx([2.0])


def test_ratios(protocol):
    series = {"ours": protocol.Series([1.0, 2.0, 1.0], []), "theirs": protocol.Series([3.0, 3.0, 3.3], [])}
    result = protocol.compare(series, "ours", "theirs")
    assert result["ratio"] == 3.0
    assert result["range"] == [1.5, 3.3]
    assert protocol.shown(result) == "3.00x (1.50 to 3.30)"


def test_a_restless_baseline_gives_no_ratio(protocol):
    series = {"ours": protocol.Series([1.0, 1.0], []), "theirs": protocol.Series([1.0, 1.2], [])}
    result = protocol.compare(series, "ours", "theirs")
    assert result["ratio"] is None
    assert protocol.shown(result) == "no ratio: theirs changed by 20% from one round to the next (limit 15%)"


def test_a_slow_drift_divides_out_and_is_said(protocol):
    wall = [1.0, 1.1, 1.2, 1.3]
    series = {"ours": protocol.Series([x / 2 for x in wall], []), "theirs": protocol.Series(wall, [])}
    result = protocol.compare(series, "ours", "theirs")
    assert result["ratio"] == result["range"][0] == result["range"][1] == 2.0
    assert protocol.shown(result) == "2.00x (2.00 to 2.00; the peer drifted by 30%)"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_tensor_peak_counts_what_lives_at_once(protocol):
    def work():
        for _ in range(3):
            torch.ones(2**18).add_(1)

    peak = protocol.peak_memory(work)
    assert 2**20 <= peak["tensor_growth"] < 1.5 * 2**20
    assert peak["rss_peak"] >= peak["rss_before"] > 0


def test_rounds_are_added_until_enough_in_a_row_were_calm(protocol, monkeypatch):
    taken = {"ours": iter([1.0, 1.0, 3.0, 1.0, 1.1]), "theirs": iter([2.0, 4.0, 2.0, 2.1, 2.0])}
    now = [0.0]
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: now[0])

    def work(name):
        now[0] += next(taken[name])

    variants = {"ours": lambda: work("ours"), "theirs": lambda: work("theirs")}
    series = protocol.interleave(variants, rounds=2, warmup=0, most=9)
    assert series["ours"].wall == pytest.approx([1.0, 1.1])
    assert series["theirs"].wall == pytest.approx([2.1, 2.0])
    assert series["ours"].dropped == pytest.approx([1.0, 1.0, 3.0])
    assert series["theirs"].summary()["dropped"] == pytest.approx([2.0, 4.0, 2.0])
    assert series["theirs"].summary()["wall_rounds"] == pytest.approx([2.1, 2.0])


def test_only_the_steady_decide_when_rounds_end(protocol, monkeypatch):
    taken, now = {"ours": iter([1.0, 3.0, 1.0]), "theirs": iter([2.0, 2.0, 2.0])}, [0.0]
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: now[0])

    def work(name):
        now[0] += next(taken[name])

    variants = {"ours": lambda: work("ours"), "theirs": lambda: work("theirs")}
    series = protocol.interleave(variants, rounds=2, warmup=0, most=3, steady=["theirs"])
    assert series["ours"].wall == pytest.approx([1.0, 3.0])


def test_a_machine_that_never_calms_down_ends_and_gives_no_ratio(protocol, monkeypatch):
    now, step = [0.0], [1.0]
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: now[0])

    def work():
        step[0] *= 1.3
        now[0] += step[0]

    series = protocol.interleave({"ours": work, "theirs": work}, rounds=2, warmup=0, most=4)
    assert [len(one.wall) + len(one.dropped) for one in series.values()] == [4, 4]
    assert protocol.compare(series, "ours", "theirs")["ratio"] is None


def test_a_refused_row_does_not_replace_a_good_one(protocol):
    good, bad = {"what": "a", "speed": {"ratio": 2.0}}, {"what": "a", "speed": {"ratio": None, "refused": "restless"}}
    other = {"what": "b", "speed": {"x": {"ratio": 1.0}}}
    assert protocol.keep([good, other], bad) == [good, other]
    assert protocol.keep([bad, other], good) == [good, other]
    better = {"what": "a", "speed": {"ratio": 3.0}}
    assert protocol.keep([good, other], better) == [better, other]
    assert protocol.keep([good], other) == [good, other]
    assert protocol.refused({"kinds": {"chat": {"over plain": {"ratio": None, "refused": ""}}}})


def test_what_a_record_keeps_of_another_machine_says_so(protocol, tmp_path):
    from benchmarks.support.footer import footer

    def of(cpu, date, *rows, **tables):
        facts = {"cpu": cpu, "date": date, "cpus": 2, "python": "3", "packages": {}}
        return {"machine": facts, "rows": list(rows), **tables}

    first, again = {"what": "a", "batch": 1, "seconds": 2.0}, {"what": "a", "batch": 1, "seconds": 1.0}
    other = {"what": "a", "batch": 8, "seconds": 3.0}
    protocol.write("x", of("old", "2026-01-01T00", first, other, table={"b": 1}), tmp_path)
    protocol.write("x", of("mid", "2026-01-02T00", first, other, table={"b": 2}), tmp_path)
    protocol.write("x", of("new", "2026-01-03T00", again, other, table={"b": 2}), tmp_path)
    machine = protocol.read("x", tmp_path)["machine"]
    assert {part: one["cpu"] for part, one in machine["earlier"].items()} == {"a 8": "old", "table": "mid"}
    protocol.write("x", of("new", "2026-01-03T00", again, other, table={"b": 2}), tmp_path)  # in the same second
    assert protocol.read("x", tmp_path)["machine"] == machine
    said = footer("x", machine)
    assert said.endswith("On mid, 2026-01-02: table. On old, 2026-01-01: a 8.")
    protocol.write("x", of("new", "2026-01-04T00", first, other | {"seconds": 9.0}), tmp_path)
    assert "earlier" not in protocol.read("x", tmp_path)["machine"]
