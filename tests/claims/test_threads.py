"""The parts of the claim on threads that do not depend on time."""

import multiprocessing
import sys
import threading

import pytest

from volvelle.claims import threads

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")


def test_threads_share_the_heap_and_processes_do_not():
    findings = threads._sharing(multiprocessing.get_context("fork"))
    assert [finding.held for finding in findings] == [True, True, True]


def test_a_process_that_shared_the_heap_would_be_noticed():
    class Shared:
        Process = threading.Thread

    assert [finding.held for finding in threads._sharing(Shared)] == [True, False, True]


def test_a_busy_machine_is_not_judged():
    ratios = {"threads": [1.0, 2.0], "processes": [1.0, 1.0]}
    busy = threads._overlap(ratios, ratios, ratios, quiet=False, free=False)
    assert [finding.held for finding in busy] == [False, False, None, None, None, None]
    quiet = threads._overlap(ratios, ratios, ratios, quiet=True, free=False)
    assert [finding.held for finding in quiet] == [False, False, False, False, True, False]
    assert threads._overlap(ratios, ratios, ratios, quiet=True, free=True)[2].held is None


@pytest.mark.parametrize("make", [threading.Thread, multiprocessing.get_context("fork").Process])
def test_the_ping_pong_ends_and_leaks_nothing(make):
    assert threads._ping_pong(make, 5) > 0
    assert threads._creation(make, 2) > 0
