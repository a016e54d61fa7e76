"""A Ctrl-C in the middle of a plan is not lost in a callback, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
import weakref

import pytest
import torch
from torch import nn

from volvelle.inspect import plan_memory
from volvelle.inspect.memory_interrupt import Deferred
from volvelle.inspect.memory_session import Session
from volvelle.inspect.memory_tracker import StorageTracker

LIMIT = 20.0
"""Seconds in which a Ctrl-C must have been heard."""


def build():
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.ReLU())))


def plan():
    return plan_memory(build, torch.zeros(4, 16), loss=lambda model, x: model(x).sum())


def press():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Nothing is written about exceptions in callbacks, and the handler is the old one."""
    unheard, before = [], sys.unraisablehook
    sys.unraisablehook = unheard.append
    yield
    sys.unraisablehook = before
    assert not unheard
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_the_end_of_a_storage(monkeypatch):
    ends, at, original = 0, -1, StorageTracker._end

    def end(self, key):
        nonlocal ends
        if ends == at:
            press()
        ends += 1
        original(self, key)

    monkeypatch.setattr(StorageTracker, "_end", end)
    expected, total = plan().timeline, ends
    assert total > 20
    for at in range(0, total, 2):
        ends = 0
        with pytest.raises(KeyboardInterrupt):
            plan()
        assert at < ends
    assert plan().timeline == expected


def test_in_a_callback_of_others():
    class Thing:
        pass

    thing = Thing()
    ended = weakref.ref(thing, lambda _: press())
    with pytest.raises(KeyboardInterrupt), Session():  # noqa: PT012 - what happens in between is the point
        del thing
        assert ended() is None  # not raised in the callback, nor at once behind it
        with contextlib.suppress(KeyboardInterrupt):  # and heard although somebody swallows it here
            torch.zeros(3)
            pytest.fail("an operation is where it is heard")


def test_at_random_moments():
    """Wherever it comes, while planning or between two plans, it is heard, and the next plan is as the first."""
    expected, draw = plan(), random.Random(0)
    began = time.perf_counter()
    plan()
    length = time.perf_counter() - began
    for _ in range(25):
        delay, until = draw.uniform(0, 2 * length), time.monotonic() + LIMIT
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the signal may come anywhere in it
            timer = threading.Timer(delay, press)
            timer.start()
            while time.monotonic() < until:
                plan()
        timer.join()
    assert plan().timeline == expected.timeline


def test_a_second_one_does_not_wait():
    with pytest.raises(KeyboardInterrupt) as caught, Deferred():  # noqa: PT012
        press()
        with pytest.raises(KeyboardInterrupt):
            press()
    assert caught.value.__context__ is None


def test_an_error_on_the_way_out_gives_way():
    with pytest.raises(KeyboardInterrupt) as caught, Deferred():  # noqa: PT012
        press()
        raise ValueError("of the model")
    assert isinstance(caught.value.__context__, ValueError)


def test_a_handler_that_only_takes_note_is_asked_once():
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with Session():
            press()
            assert not heard
            torch.zeros(3)
            torch.zeros(3)
        assert heard == [signal.SIGINT]
        with Deferred():
            press()
        assert heard == [signal.SIGINT] * 2
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_ignores_it_still_does_and_threads_leave_it_alone():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Session():
            press()
            torch.zeros(3)
    finally:
        signal.signal(signal.SIGINT, before)
    found = []
    thread = threading.Thread(target=lambda: found.append(plan().peak))
    thread.start()
    thread.join()
    assert found == [plan().peak]
