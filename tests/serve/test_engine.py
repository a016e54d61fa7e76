"""The engine's turns: how much of the prompts a turn reads."""

from __future__ import annotations

import pytest
from tests.serve.conftest import CONTEXT

from volvelle.decode import seats
from volvelle.decode.seats import Seats
from volvelle.serve import engine as engines
from volvelle.serve.engine import Engine, Job


def waiting(model, *prompts):
    """An engine that has not begun, with these prompts before it."""
    engine, told = Engine(Seats(model, 4, context=CONTEXT), queue=8), []
    engine._inbox.extend(Job(prompt, told.append, max_tokens=8) for prompt in prompts)
    return engine


def test_short_prompts_that_come_at_once_sit_down_together(model):
    engine = waiting(model, [5, 6, 7], [5, 6], [7, 8, 9, 5], [6], [7])
    engine._turn()
    assert engine.load.running == 4  # as many as there are seats


@pytest.mark.parametrize(("length", "seated"), [(8, 3), (16, 2), (32, 1), (33, 0)])
def test_a_turn_reads_no_more_than_a_part(model, length, seated, monkeypatch):
    """Texts that sit wait for a part's tokens, however many prompts they belong to."""
    monkeypatch.setattr(engines, "PART", 32)
    monkeypatch.setattr(seats, "PART", 32)
    engine = waiting(model, *[[5] * length] * 3)
    monkeypatch.setattr(engine.seats, "step", list)  # nothing is written: none ends
    engine._turn()
    assert engine.load.running == seated
