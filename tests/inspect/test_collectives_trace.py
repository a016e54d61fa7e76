"""An all-reduce message by message: bytes by the formulas, steps by what had to arrive first."""

import pytest

from volvelle.errors import UsageError
from volvelle.inspect.collectives_trace import matched, trace_all_reduce


def test_the_ring_sends_what_its_formula_says():
    trace = trace_all_reduce("ring", 3, 24_000)
    assert trace.right
    assert trace.sent == [2 * 2 * 24_000 // 3] * 3
    assert trace.steps == 2 * 2
    assert {(m.step, m.source, m.target) for m in trace.messages} == {
        (t, r, (r + 1) % 3) for t in range(4) for r in range(3)
    }
    assert all(0 <= m.left <= m.arrived for m in trace.messages)
    assert (trace.work.messages, trace.work.total) == (len(trace.messages), sum(trace.sent))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ring", "halving-doubling", "recursive-doubling", "tree", "star"])
@pytest.mark.parametrize("ranks", [2, 4, 5])
def test_every_algorithm_sends_what_its_formula_says(algorithm, ranks):
    trace = trace_all_reduce(algorithm, ranks, 4 * ranks * 500)
    assert trace.right
    assert (len(trace.messages), sum(trace.sent)) == (trace.work.messages, trace.work.total)
    assert trace.steps <= trace.work.rounds


def test_a_rank_that_runs_ahead_does_not_hurry_the_others():
    """Ranks 1 and 2 send to 0, which answers both: its answers are step 1 even where one came late."""
    up = [
        [(3.0, 1, -8), (9.0, 2, -8), (9.5, 1, 8), (9.6, 2, 8)],
        [(1.0, 0, 8), (10.0, 0, -8)],
        [(8.0, 0, 8), (11.0, 0, -8)],
    ]
    found = matched(up)
    assert [(m.step, m.source, m.target) for m in found] == [(0, 1, 0), (0, 2, 0), (1, 0, 1), (1, 0, 2)]
    assert [(m.left, m.arrived) for m in found] == [(0.0, 2.0), (7.0, 8.0), (8.5, 9.0), (pytest.approx(8.6), 10.0)]


@pytest.mark.parametrize(("algorithm", "ranks", "size"), [("two-level", 4, 64), ("ring", 1, 64), ("ring", 4, 60)])
def test_what_cannot_be_traced_is_said(algorithm, ranks, size):
    with pytest.raises(UsageError, match=r"algorithm: |ranks: 2 or more"):
        trace_all_reduce(algorithm, ranks, size)
