"""The claim on ring all-reduces: its counts and equalities hold on any machine, its times are only reported here."""

from __future__ import annotations

from volvelle.claims import allreduce


def test_bytes_and_bits_hold_on_short_vectors(monkeypatch):
    monkeypatch.setattr(allreduce, "LONG", 8 << 20)
    found = allreduce.measure("quick")
    exact = [finding for finding in found.findings if "time" not in finding.what]
    assert len(exact) == 8  # four for each number of ranks
    assert all(finding.held for finding in exact), exact
    assert [finding.what for finding in found.findings if "time" in finding.what] == [
        f"{ratio}, {p} ranks" for p in (2, 4) for ratio in ("naive time / ring time", "ring time / gloo time")
    ]


def test_a_wrong_count_is_not_held(monkeypatch):
    """One byte too many, from a formula that is off, and the claim says so."""
    from volvelle.parts.collectives import model

    right = model.work_of
    monkeypatch.setattr(allreduce, "LONG", 8 << 20)
    monkeypatch.setattr(model, "work_of", lambda *given: right(*given)._replace(total=right(*given).total - 1))
    found = allreduce.measure("quick")
    assert [f.held for f in found.findings if "2 (p - 1) V" in f.what and "/ p" not in f.what] == [False, False]
    assert found.verdict == "not held"
