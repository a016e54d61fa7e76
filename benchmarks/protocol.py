"""How every benchmark here measures: interleaved rounds, a ratio per round, and no ratio when the machine was restless.

Variants run in turn inside one process, so that a slow minute slows all of them; the order turns with every round. A
ratio is baseline / ours in the same round; its median and range are published. When the baseline's time changed by more
than 15 % from one round to the next, the ratio is refused: what changes that fast does not fall on all variants alike.
A slow drift over many rounds does, and divides out; it is stored, and said where it is above the limit. On a machine
that other people's work slows down now and then, rounds are added until that many in a row were calm for the baseline
and mostly for us alike; which rounds count is decided by their own steadiness, never by the ratio. A lock file keeps
two benchmarks from running together.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import gc
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from volvelle.files import write_atomic

RESULTS = Path(__file__).resolve().parent / "results"
MAX_JUMP = 0.15
NAMES = ("what", "who", "case", "name", "precision", "dtype", "drafter", "draft", "batch")
"""The fields of a row that say what it is."""


def parser(doc: str | None, parts: Iterable[str]) -> argparse.ArgumentParser:
    """The options of benchmarks that have several parts: --quick, --only, --rounds and --threads."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="a smoke run: little work, nothing written")
    made.add_argument("--only", nargs="+", choices=list(parts), default=list(parts))
    made.add_argument("--rounds", type=int, help="at least 5 for figures to publish")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    return made


@dataclass
class Series:
    """Seconds of one variant, a number a round: wall clock, and CPU time of the whole process."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)  # wall seconds of rounds before the calm ones

    @property
    def drift(self) -> float:
        """How far the slowest round lies above the fastest."""
        return max(self.wall) / min(self.wall) - 1

    @property
    def jump(self) -> float:
        """The largest change from one round to the next."""
        pairs = itertools.pairwise(self.wall)
        return max((max(pair) / min(pair) - 1 for pair in pairs), default=0.0)

    def summary(self) -> dict[str, Any]:
        """Median and range, in seconds."""
        return {
            "wall_median": statistics.median(self.wall),
            "wall_range": [min(self.wall), max(self.wall)],
            "wall_rounds": self.wall,
            "cpu_median": statistics.median(self.cpu),
            "rounds": len(self.wall),
            "drift": self.drift,
            "jump": self.jump,
            "dropped": self.dropped,
        }


def interleave(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    warmup: int = 1,
    most: int = 0,
    best_of: int = 1,
    passes: int = 1,
    steady: Collection[str] | None = None,
    lasting: float = 0.0,
) -> dict[str, Series]:
    """Run every variant `warmup` times, then once a round in turning order; returns the seconds of each.

    With `passes` above 1 a round goes through all variants that often, in turn, and counts the mean seconds of each:
    disturbances shorter than a round then fall on all variants alike. A variant that takes less than `lasting` seconds
    is called so often each time that it takes as long, and the mean of a call counts: of a call of few milliseconds,
    one turn of the scheduler would be a large part.

    With `best_of` above 1 a variant runs that often in each round and its fastest run counts: what a passing
    disturbance does to one run of some seconds is left out, for all variants alike.
    With `most` above `rounds`, rounds are added, up to `most`, until in the last `rounds` no variant changed
    by more than the limit from one round to the next (no variant of `steady`, the baselines, where it is given); the
    earlier ones are kept as `dropped`.
    """
    names = list(variants)
    calls = dict.fromkeys(names, 1)
    for _ in range(warmup):
        for name in names:
            calls[name] = max(1, math.ceil(lasting / max(timed(variants[name])[0], 1e-9)))
    series = {name: Series() for name in names}
    for number in range(max(rounds, most)):
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for cycle in range(number * passes, (number + 1) * passes):
            turn = cycle % len(names)
            for name in names[turn:] + names[:turn]:
                gc.collect()
                taken[name].append(min(timed(variants[name], calls[name]) for _ in range(best_of)))
        for name, one in series.items():
            wall, cpu = zip(*taken[name], strict=True)
            one.wall.append(statistics.fmean(wall))
            one.cpu.append(statistics.fmean(cpu))
        if number + 1 < rounds:
            continue
        for one in series.values():
            one.dropped += one.wall[:-rounds]
            one.wall, one.cpu = one.wall[-rounds:], one.cpu[-rounds:]
        if all(series[name].jump <= MAX_JUMP for name in (names if steady is None else steady)):
            break
    return series


def timed(work: Callable[[], object], calls: int = 1) -> tuple[float, float]:
    """Seconds of one call, the mean of so many: wall clock, and CPU time of the process."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        work()
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def compare(series: Mapping[str, Series], ours: str, baseline: str) -> dict[str, Any]:
    """The speed ratio baseline / ours: its median and range over the rounds, or why there is none."""
    theirs = series[baseline]
    if theirs.jump > MAX_JUMP:
        told = f"{baseline} changed by {theirs.jump:.0%} from one round to the next (limit {MAX_JUMP:.0%})"
        return {"ratio": None, "refused": told}
    ratios = [b / o for b, o in zip(theirs.wall, series[ours].wall, strict=True)]
    found = {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)], "rounds": ratios}
    return found | {"drift": theirs.drift}


def shown(comparison: Mapping[str, Any]) -> str:
    """A comparison as one phrase.

    >>> shown({"ratio": 1.5, "range": [1.4, 1.6]})
    '1.50x (1.40 to 1.60)'
    >>> shown({"ratio": 1.5, "range": [1.4, 1.6], "drift": 0.25})
    '1.50x (1.40 to 1.60; the peer drifted by 25%)'
    """
    if comparison["ratio"] is None:
        return f"no ratio: {comparison['refused']}"
    low, high = comparison["range"]
    drift = comparison.get("drift", 0.0)
    note = f"; the peer drifted by {drift:.0%}" if drift > MAX_JUMP else ""
    return f"{comparison['ratio']:.2f}x ({low:.2f} to {high:.2f}{note})"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold the machine-wide benchmark lock; waits, and says so, while another benchmark runs."""
    with open(Path(tempfile.gettempdir()) / "volvelle-benchmark.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another benchmark is running; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """What the figures were measured on, and with which versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def write(name: str, payload: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write one benchmark's JSON and return its path; what it keeps of the stored one keeps its machine and date."""
    path = folder / f"{name}.json"
    write_atomic(path, json.dumps(_dated(json.loads(json.dumps(payload)), read(name, folder)), indent=2) + "\n")
    return path


def _dated(payload: dict[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The payload, its machine's "earlier" naming the parts that are the stored ones: {part: {"cpu": …, "date": …}}."""
    now, then = payload.get("machine"), stored.get("machine")
    if not now or not then:
        return payload
    known, before = _parts(payload), _parts(stored)
    # Two writes of one run may fall into one second: what they add is of one machine, what was earlier stays so.
    of_then = {name: then[name] for name in ("cpu", "date")}
    facts = {part: of_then for part in before if then["date"] != now["date"]} | then.get("earlier", {})
    earlier = {part: facts[part] for part, one in known.items() if part in facts and before.get(part) == one}
    bare = {key: value for key, value in now.items() if key != "earlier"}
    return payload | {"machine": bare | ({"earlier": earlier} if earlier else {})}


def _parts(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is measured by itself: each row, by the values that name it, and every other table."""
    rows = {
        " ".join(f"{row[key]:g}" if isinstance(row[key], float) else str(row[key]) for key in NAMES if key in row): row
        for row in record.get("rows", [])
    }
    inner = {key: value for key, value in record.items() if isinstance(value, (dict, list))}
    return {name: value for name, value in inner.items() if name not in ("machine", "rows", "size")} | rows


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """What `write` stored under that name; empty when there is nothing yet."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def keep(rows: Sequence[dict[str, Any]], row: dict[str, Any], key: Sequence[str] = ("what",)) -> list[dict[str, Any]]:
    """The rows with `row` in the place of the one of the same `key`; a refused ratio does not replace a good one."""
    same = [all(one.get(name) == row.get(name) for name in key) for one in rows]
    if not any(same):
        return [*rows, row]
    return [row if it and (refused(one) or not refused(row)) else one for one, it in zip(rows, same, strict=True)]


def refused(row: Mapping[str, Any]) -> bool:
    """Whether a ratio of the row, or of a table in it, was refused.

    >>> refused({"speed": {"ratio": None, "refused": "restless"}}), refused({"speed": {"ours": {"ratio": 2.0}}})
    (True, False)
    """
    inner = [value for value in row.values() if isinstance(value, Mapping)]
    return "refused" in row or any(map(refused, inner))


def in_subprocess(script: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `script` with `arguments` in a process of its own; its last line of output is JSON."""
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_memory(work: Callable[[], object]) -> dict[str, int]:
    """Bytes that `work` needs above what was there before: peak of live tensors, and of the process (RSS).

    It runs twice: once plainly for the RSS, once under the profiler for the tensors, whose bookkeeping takes memory
    itself. Call it in a process that does nothing else.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present RSS
    before = _status("VmRSS")
    work()
    peak = _status("VmHWM")
    return {"rss_before": before, "rss_peak": peak, "rss_growth": peak - before, "tensor_growth": tensor_peak(work)}


def tensor_peak(work: Callable[[], object]) -> int:
    """Bytes of tensors alive at once, at most, that `work` allocates."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    assert profile.profiler is not None
    results: Any = profile.profiler.kineto_results
    events = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    live = peak = 0
    for _, size in events:
        live += size
        peak = max(peak, live)
    return peak


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
