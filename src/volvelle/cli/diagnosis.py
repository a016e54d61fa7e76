"""The checks of `volvelle doctor`: each returns rows of what was found, ok / warn / fail, and a tip."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import volvelle
from volvelle import hub
from volvelle.hub.progress import megabytes
from volvelle.processor import BF16, flags

EXTRAS = {
    "serve": ("fastapi", "uvicorn"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "peers": ("transformers", "peft"),
}
CORE = ("numpy", "scipy", "safetensors", "tokenizers", "gguf", "jinja2", "huggingface_hub", "sacrebleu")
CPU_FLAGS = {"avx2": "AVX2", "avx512f": "AVX512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Check:
    """One row: what was looked at, how it is, what was found, and what to do."""

    what: str
    state: Literal["ok", "warn", "fail"]
    found: str
    tip: str | None = None


def software() -> Iterator[Check]:
    """Python, Volvelle, torch, the core packages and the extras."""
    version = sys.version_info
    yield Check("python", "ok" if version >= (3, 11) else "fail", f"{platform.python_version()} ({sys.executable})")
    yield Check("volvelle", "ok", f"{volvelle.__version__} ({Path(volvelle.__file__).parent})")
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        yield Check("torch", "fail", f"cannot be imported: {error}", "pip install torch")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    old = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 13)
    tip = "Volvelle is tested from torch 2.13 on" if old else None
    yield Check("torch", "warn" if old else "ok", f"{torch.__version__}, {build}", tip)
    missing = [name for name in CORE if importlib.util.find_spec(name) is None]
    found = f"missing: {', '.join(missing)}" if missing else f"all {len(CORE)} present"
    yield Check("packages", "fail" if missing else "ok", found, "pip install volvelle" if missing else None)
    extras = {extra: all(importlib.util.find_spec(name) for name in names) for extra, names in EXTRAS.items()}
    words = [f"{extra} {'yes' if there else 'no'}" for extra, there in extras.items()]
    yield Check("extras", "ok", f"{', '.join(words)} (optional)")


def processor() -> Iterator[Check]:
    """Threads against cores and quota, instruction sets, CUDA."""
    import torch

    cores, quota = allowed_cores(), cgroup_quota()
    usable = min(cores, quota) if quota else cores
    threads = torch.get_num_threads()
    found = f"torch uses {threads}, {cores} cores allowed"
    found += f", container quota {quota:g} cores" if quota else ""
    found += f", OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}" if "OMP_NUM_THREADS" in os.environ else ""
    best = max(1, int(usable))
    if threads > max(1, usable):
        tip = f"more threads than cores slow each other down: export OMP_NUM_THREADS={best}"
        yield Check("threads", "warn", found, tip)
    elif threads < best // 2:
        yield Check("threads", "warn", found, f"half of the machine idles: export OMP_NUM_THREADS={best}")
    else:
        yield Check("threads", "ok", found)
    found = flags()
    names = [name for flag, name in CPU_FLAGS.items() if flag in found]
    if not found:
        yield Check("cpu", "ok", f"{platform.machine()}, instruction sets unknown on {platform.system()}")
    else:
        note = "bf16 in hardware" if found & BF16 else "no bf16 in hardware: fp32 is the faster precision here"
        yield Check("cpu", "ok", f"{platform.machine()}, {' '.join(names) or 'no AVX2'}; {note}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Check(f"cuda:{index}", "ok", f"{properties.name}, {megabytes(properties.total_memory)}")
    elif torch.version.cuda:
        yield Check("cuda", "warn", "this torch build has CUDA, but no device answers", "check the driver: nvidia-smi")
    else:
        yield Check("cuda", "ok", "none; everything runs on the CPU")


def resources() -> Iterator[Check]:
    """Memory that is free, also under a container's limit, and disk at the model store."""
    free = free_memory()
    if free is None:
        yield Check("memory", "ok", f"free memory is not known on {platform.system()}")
    else:
        low = free < 2e9
        tip = "SmolLM2 needs about 2 GB to be adapted" if low else None
        yield Check("memory", "warn" if low else "ok", f"{megabytes(free)} free", tip)
    home = hub.home()
    folder = next(path for path in (home, *home.parents) if path.exists())
    disk = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        yield Check("store", "fail", f"{home} cannot be written", "set VOLVELLE_HOME to a folder you may write to")
    else:
        low = disk < 1e9
        tip = "free some space, or set VOLVELLE_HOME to another folder" if low else None
        yield Check("store", "warn" if low else "ok", f"{home}, {megabytes(disk)} free", tip)


def assets() -> Iterator[Check]:
    """Every stored asset, its SHA-256 computed anew."""
    for name in hub.ASSETS:
        stored = hub.status(name, verify=True)
        if stored.state == "damaged":
            yield Check(name, "fail", stored.note, f"volvelle get {name}")
        elif stored.state == "absent":
            yield Check(name, "ok", f"not fetched (volvelle get {name})")
        else:
            yield Check(name, "ok", f"SHA-256 verified, {stored.path}" if not stored.note else stored.note)


def compute(seconds: float = 0.5, size: int = 768) -> Iterator[Check]:
    """Matrix products in fp32 and bf16 for `seconds` each: right, finite, and how fast (a glance, no benchmark)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, dtype=torch.float64) for _ in range(2))
    exact = a @ b
    rates = {}
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x, y = a.to(dtype), b.to(dtype)
        product, rounds, begun = x @ y, 0, time.perf_counter()
        while (spent := time.perf_counter() - begun) < seconds:
            product = x @ y
            rounds += 1
        error = float((product.double() - exact).norm() / exact.norm())
        rates[dtype] = 2 * size**3 * rounds / spent / 1e9
        name = str(dtype).removeprefix("torch.")
        found = f"about {rates[dtype]:.0f} GFLOP/s, relative error {error:.0e}"
        wrong = not error < limit  # also true for NaN
        tip = "the arithmetic is wrong: reinstall torch, then suspect the machine" if wrong else None
        yield Check(f"matmul {name}", "fail" if wrong else "ok", found, tip)
    if rates[torch.bfloat16] < 0.8 * rates[torch.float32]:
        yield Check("precision", "warn", "bf16 is slower than fp32 here", "choose dtype=float32")


def allowed_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cgroup_quota(root: Path = CGROUP) -> float | None:
    """Return the container's CPU limit in cores, from cgroup v2 or v1; None when there is none."""
    try:
        limit, _, period = (root / "cpu.max").read_text().strip().partition(" ")
        return None if limit == "max" else int(limit) / int(period or 100000)
    except (OSError, ValueError):
        pass
    try:
        limit, period = (int((root / "cpu" / f"cpu.cfs_{word}_us").read_text()) for word in ("quota", "period"))
        return limit / period if limit > 0 and period > 0 else None
    except (OSError, ValueError):
        return None


def free_memory(root: Path = CGROUP) -> int | None:
    """Return bytes of memory still available: the kernel's estimate, or what the container's limit leaves of it."""
    available = None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        return None
    try:
        limit, used = (int((root / f"memory.{word}").read_text()) for word in ("max", "current"))
        # Page cache counts as used but is given back on demand.
        cached = next(
            int(line.split()[1])
            for line in (root / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
        room = limit - used + cached
        return room if available is None else min(available, room)
    except (OSError, ValueError, StopIteration):
        return available
