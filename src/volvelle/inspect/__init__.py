"""Look inside a module or a process. Names are resolved on first use, so importing this does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volvelle.lazy import lazy

if TYPE_CHECKING:
    from volvelle.inspect.flops import FlopCount as FlopCount
    from volvelle.inspect.flops import count_flops as count_flops
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
    from volvelle.inspect.receptive_field_effective import EffectiveField as EffectiveField
    from volvelle.inspect.receptive_field_effective import effective_field as effective_field
    from volvelle.inspect.receptive_fields import NodeField as NodeField
    from volvelle.inspect.receptive_fields import ReceptiveField as ReceptiveField
    from volvelle.inspect.receptive_fields import chain_field as chain_field
    from volvelle.inspect.receptive_fields import receptive_field as receptive_field
    from volvelle.inspect.threads import LiveThread as LiveThread
    from volvelle.inspect.threads import ThreadReport as ThreadReport
    from volvelle.inspect.threads import live_threads as live_threads
    from volvelle.inspect.threads_peek import answer_threads as answer_threads

_HOMES = {
    "EffectiveField": "receptive_field_effective",
    "FlopCount": "flops",
    "GradientReport": "gradients",
    "LiveThread": "threads",
    "Measurement": "memory_measure",
    "MemoryPlan": "memory_plan",
    "NodeField": "receptive_fields",
    "ReceptiveField": "receptive_fields",
    "ThreadReport": "threads",
    "answer_threads": "threads_peek",
    "chain_field": "receptive_fields",
    "count_flops": "flops",
    "effective_field": "receptive_field_effective",
    "first_nonfinite": "gradients",
    "live_threads": "threads",
    "measure_memory": "memory_measure",
    "measure_peak": "memory_measure",
    "plan_memory": "memory_plan",
    "nonfinite_origin": "gradients",
    "plan_program": "memory_plan",
    "receptive_field": "receptive_fields",
    "trace_gradients": "gradients",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = lazy(__name__, _HOMES)
