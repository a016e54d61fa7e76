"""A program's peak as it is planned and as the allocator sees it."""

from __future__ import annotations

from collections.abc import Callable

from volvelle.inspect import measure_peak
from volvelle.inspect.memory_session import Session


def planned_and_measured(work: Callable[[], Callable[[], None]]) -> tuple[int, int]:
    """Peak of `work()()` planned and measured, both at its second run."""
    with Session() as session:
        run = work()
        run()
        start = session.position
        run()
    return session.trace_since(start).peak, measure_peak(work).peak
