"""The oracle: run the same step for real and ask the profiler what the allocator saw."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from volvelle.inspect.memory_inputs import Inputs
from volvelle.inspect.memory_options import StepOptions
from volvelle.inspect.memory_step import Loss, TrainingStep, model_loss

_MARK = "volvelle: memory window"


@dataclass(frozen=True)
class Measurement:
    """What one program took: `peak` bytes of tensors in the window, and the process's resident set then and before.

    The resident set also holds the interpreter, torch's code, allocator slack and the profiler itself.
    """

    peak: int
    resident: int
    resident_before: int

    @property
    def resident_growth(self) -> int:
        """Resident bytes that came with the program."""
        return self.resident - self.resident_before


def measure_memory(
    build: Callable[[], nn.Module],
    batch: Any,
    *,
    size: int | None = None,
    loss: Loss = model_loss,
    **options: Any,
) -> Measurement:
    """Run two real training steps on the CPU and return the second one's peak, in bytes.

    Takes `plan_memory`'s arguments (`options` are those of `StepOptions`), builds and runs the model for real: it
    needs the memory that the plan predicts.
    """
    step_options, inputs = StepOptions(**options), Inputs(batch, size)

    def setup() -> Callable[[], None]:
        step = TrainingStep(build, step_options, loss)
        return lambda: step.run(inputs.real(inputs.size))

    return measure_peak(setup)


def measure_peak(setup: Callable[[], Callable[[], Any]]) -> Measurement:
    """Call `setup()`, then what it returned, and measure the second call.

    Everything is built under the profiler: it only knows the size of memory that it saw being allocated.
    """
    gc.collect()  # garbage of an earlier measurement that is freed in this one would count as less memory
    before = resident("VmRSS")
    with contextlib.suppress(OSError):  # the peak counter cannot be reset in some containers
        Path("/proc/self/clear_refs").write_text("5")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run = setup()
        run()
        with record_function(_MARK):
            run()
        del run
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events: list[Any] = list(profiler.profiler.kineto_results.events())
    window = next(e for e in events if e.name() == _MARK)
    start, stop = window.start_ns(), window.start_ns() + window.duration_ns()
    # The events come in the order in which they happened; a stable sort keeps those of the same nanosecond so.
    changes = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda row: row[0])
    total = peak = 0
    for moment, change in changes:
        if moment >= start:
            peak = max(peak, total)
        if moment > stop:
            break
        total += change
        if moment >= start:
            peak = max(peak, total)
    return Measurement(peak, resident("VmHWM"), before)


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process's resident set now (VmRSS) or at most so far (VmHWM); 0 where /proc has none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
