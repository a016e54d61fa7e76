"""The claim on exact resume: a process that is really killed, and runs that come back wrong."""

from __future__ import annotations

import pytest

from volvelle.claims import exact_resume
from volvelle.claims.exact_resume import differing, history, run
from volvelle.train.player import Player


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path):
    found = {f.what: f for f in exact_resume._killed(tmp_path, "language model", kills=1, steps=14)}
    assert all(f.held is not False for f in found.values()), found
    assert found["language model: processes ended by SIGKILL"].value == 1


@pytest.mark.parametrize("kind", exact_resume.KINDS)
def test_every_part_of_a_checkpoint_is_needed(kind, tmp_path):
    assert exact_resume._needed(tmp_path, kind, 6).held


@pytest.mark.parametrize("kind", exact_resume.KINDS)
def test_optimisers_that_begin_anew_would_be_noticed(kind, tmp_path, monkeypatch):
    _, whole = run(tmp_path / "whole", kind, 6)
    run(tmp_path / "part", kind, 6, until=3)
    monkeypatch.setattr(Player, "load_state_dict", lambda self, state: None)
    result, other = run(tmp_path / "part", kind, 6, seed=7)
    assert result.resumed_from == 3
    assert differing(whole, other) > 0
    assert history(tmp_path / "whole") != history(tmp_path / "part")


def test_half_a_line_of_metrics_is_left_out(tmp_path):
    folder = exact_resume.Folder(tmp_path)
    folder.log({"event": "train", "step": 4})
    (tmp_path / "metrics.jsonl").open("a").write('{"event": "tr')
    assert exact_resume.reached(folder) == 4
