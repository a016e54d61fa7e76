"""`volvelle draft`: heads for a small run, its last lines, and `volvelle generate` with what it left."""

from __future__ import annotations

import json

import pytest

from volvelle.cli.main import main

TEMPLATES = ("prompt={{ ask }}:", "completion={{ answers }}")
SHORT = ("steps=2", "batch=4", "samples=1", "max_tokens=6", "k=1")


@pytest.fixture
def inside(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("medusa", ("kind=medusa", "medusa.heads=2", "vocabulary=100", "distill=true")),
        ("mtp", ("kind=mtp", "mtp.kind=sequential")),
        ("model", ("kind=small", "small.width=16", "small.depth=1", "small.heads=2")),
    ],
)
def test_a_drafter_is_trained_and_used(kind, words, inside, capsys):
    name = f"for-{kind}"
    assert main(["draft", "runs/base", "data=rows.jsonl", *TEMPLATES, *SHORT, *words, f"run={name}"]) == 0
    said = "".join(capsys.readouterr())
    assert "accepted_per_step" in said
    assert f"draft={kind}:runs/{name}" in said
    answers = {}
    for draft in (None, f"draft={kind}:runs/{name}"):
        words = ["generate", "runs/base", "number 3:", "max_tokens=12", "precision=fp32", "--json"]
        assert main([*words, *([draft] if draft else [])]) == 0
        answers[draft] = json.loads(capsys.readouterr().out.splitlines()[-1])["text"]
    assert len(set(answers.values())) == 1


def test_what_is_wrong_is_said_before_a_run_begins(inside, capsys):
    for words, message in (
        (["kind=medsua"], "medusa"),
        (["medusa.heads=0"], "at least 1"),
        (["kind=small", "vocabulary=9"], "drafts all tokens"),
    ):
        assert main(["draft", "runs/base", "data=rows.jsonl", *TEMPLATES, *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["draft", "runs/base", "data=missing.jsonl"]) != 0
    assert not (inside / "runs" / "draft-base-1").exists()
