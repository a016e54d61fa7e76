"""A language model that trains in a second, its data, and the command that adapts it."""

from __future__ import annotations

import contextlib
import json

from volvelle.cli.main import main

SMALL = ("model.width=32", "model.depth=2", "model.heads=2", "model.context=64", "vocabulary=300", "batch=4")
"""Words of `volvelle train language` that make the model small."""


def train_base(folder):
    """Leave text.txt, rows.jsonl and a trained run `base` in the folder."""
    (folder / "text.txt").write_text("the cat sat on the mat and the dog lay on the log. " * 60)
    rows = [{"ask": f"number {i}", "answers": [f"it is {i}", f"that is {i}"]} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.chdir(folder):
        assert main(["train", "language", "data=text.txt", "steps=3", "run=base", *SMALL]) == 0


def adapt(*words):
    """Adapt `base` to rows.jsonl, in the folder of both, and return the exit code."""
    templates = ("prompt={{ ask }}:", "completion={{ answers }}")
    return main(["adapt", "runs/base", "data=rows.jsonl", *templates, "steps=4", "samples=2", "max_tokens=4", *words])
