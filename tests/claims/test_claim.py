"""The frame around claims: verdicts, files, names, and what is kept of a measurement."""

import json
import math
import re
import subprocess
import sys

import pytest

from volvelle.claims import claim as frame
from volvelle.claims.claim import Claim, Finding, Measurement, Paper, at_least, at_most
from volvelle.claims.run import run_claim
from volvelle.errors import UsageError

PAPER = Paper("A. Author", 2020, "A title", "section 1")


@pytest.mark.parametrize(
    ("findings", "verdict"),
    [
        ([], "not measurable here"),
        ([Finding("reported only", 1.0)], "not measurable here"),
        ([at_most("x", 1.0, 1.0)], "held"),
        ([at_most("x", 1.0, 1.0), at_least("y", 0.9, 1.0)], "not held"),
        ([at_least("nan", math.nan, 0.0)], "not held"),
        ([at_most("nan", math.nan, 0.0)], "not held"),
    ],
)
def test_verdict_needs_every_bound(findings, verdict):
    assert Measurement(findings).verdict == verdict


def test_a_reason_why_not_wins():
    assert Measurement([at_most("x", 0.0, 1.0)], unmeasurable="needs a GPU").verdict == "not measurable here"


def test_declared_seconds_are_bounded():
    with pytest.raises(ValueError, match="quick must take at most 60 s, got 61"):
        Claim("t", "f", PAPER, "s", "m", "a", "b", {"quick": 61})


def test_every_claim_file_loads_and_is_complete():
    assert "autograd" in frame.names()
    for name, claim in frame.catalogue():
        assert {"quick", "full"} <= set(claim.seconds), name
        assert all((claim.summary, claim.sentence, claim.paper.where)), name
        assert any("一" <= letter <= "鿿" for letter in claim.summary_zh), name
        assert not re.search(r"[一-鿿][,:;?!]|[,:;?!][一-鿿]", claim.summary_zh), f"{name}: half-width punctuation"


def test_claim_files_do_not_import_torch():
    code = "import sys; from volvelle.claims import claim; list(claim.catalogue()); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_name_suggests():
    with pytest.raises(UsageError) as caught:
        frame.load("autogard")
    assert caught.value.tip == "did you mean autograd?"


def test_record_is_kept(tmp_path):
    record = run_claim("autograd", "quick", tmp_path)
    stored = json.loads((tmp_path / "autograd.json").read_text())
    assert stored == record
    assert record["verdict"] == "held"
    assert record["machine"]["torch"]
    assert {"torch.autograd"} == set(record["peers"])


def test_a_wrong_derivative_is_caught(monkeypatch):
    """Seeded mutant: the tape's product rule forgets the second factor."""
    from volvelle.claims import autograd

    def wrong(self, other):
        a, b = self, autograd._var(other)
        return autograd.Var(a.value * b.value, [(a, lambda g: autograd._to(a)(g * b.value))])

    monkeypatch.setattr(autograd.Var, "__mul__", wrong)
    with pytest.raises(AssertionError, match="missing"):
        autograd._against_decoder(0, depth=1)


def test_a_wrong_sign_is_caught(monkeypatch):
    from volvelle.claims import autograd

    right = autograd.Var.exp
    monkeypatch.setattr(
        autograd.Var, "exp", lambda self: autograd.Var(right(self).value, [(self, lambda g: -g * right(self).value)])
    )
    assert autograd._against_decoder(0, depth=1) > 0.1
