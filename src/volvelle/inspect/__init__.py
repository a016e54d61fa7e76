"""Look inside a module or a process. Names are resolved on first use, so importing this does not import torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from volvelle.inspect.gradients import GradientReport as GradientReport
    from volvelle.inspect.gradients import first_nonfinite as first_nonfinite
    from volvelle.inspect.gradients import nonfinite_origin as nonfinite_origin
    from volvelle.inspect.gradients import trace_gradients as trace_gradients
    from volvelle.inspect.memory_measure import Measurement as Measurement
    from volvelle.inspect.memory_measure import measure_memory as measure_memory
    from volvelle.inspect.memory_measure import measure_peak as measure_peak
    from volvelle.inspect.memory_plan import MemoryPlan as MemoryPlan
    from volvelle.inspect.memory_plan import plan_memory as plan_memory
    from volvelle.inspect.memory_plan import plan_program as plan_program
    from volvelle.inspect.threads import LiveThread as LiveThread
    from volvelle.inspect.threads import ThreadReport as ThreadReport
    from volvelle.inspect.threads import live_threads as live_threads
    from volvelle.inspect.threads_peek import answer_threads as answer_threads

_HOMES = {
    "GradientReport": "gradients",
    "LiveThread": "threads",
    "Measurement": "memory_measure",
    "MemoryPlan": "memory_plan",
    "ThreadReport": "threads",
    "answer_threads": "threads_peek",
    "first_nonfinite": "gradients",
    "live_threads": "threads",
    "measure_memory": "memory_measure",
    "measure_peak": "memory_measure",
    "plan_memory": "memory_plan",
    "nonfinite_origin": "gradients",
    "plan_program": "memory_plan",
    "trace_gradients": "gradients",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    # Lazy, so that looking at threads does not import torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
