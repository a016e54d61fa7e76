"""Builds the C++ of this folder for the processor it runs on, once, and keeps it in the user's cache.

Some 80 kB and 3 seconds of one core. The file's name holds a hash of the sources, the compiler and the processor, so a
cache folder that machines share holds one for each. `VOLVELLE_NATIVE=0` does without.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

import torch

from volvelle.files import atomic_path
from volvelle.hub import home
from volvelle.processor import flags

FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w")
FOLDER = Path(__file__).parent
log = logging.getLogger("volvelle.native")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled step, built if need be; None, with a warning that says why, where it cannot be had."""
    if os.environ.get("VOLVELLE_NATIVE") == "0":
        return None
    try:
        return _declared(ctypes.CDLL(str(_built())))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None)
        reason = said.strip().splitlines()[-1] if said and said.strip() else str(error)
        log.warning("decoding without compiled code, one operation at a time: %s", reason)
        return None


def _built() -> Path:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if compiler is None:
        raise OSError("no C++ compiler found (g++, c++ or clang++; or set CXX)")
    # the compiler's libgomp is torch's, already loaded: one team of threads
    tune = "-march=native" if platform.machine() in {"x86_64", "AMD64"} else "-mcpu=native"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [(FOLDER / name).read_bytes() for name in ("vectors.h", "kernels.h", "step.cpp")]
    facts = "\n".join((version, tune, *FLAGS, torch.__version__, _processor()))
    key = hashlib.sha256(b"\0".join((*sources, facts.encode()))).hexdigest()[:16]
    path = home() / "native" / f"step-{key}.so"
    if not path.is_file():
        started = time.perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as building:
            command = [compiler, *FLAGS, tune, "-o", str(building), str(FOLDER / "step.cpp")]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        log.info("compiled the decoding step in %.1f s: %s", time.perf_counter() - started, path)
    return path


def _processor() -> str:
    """What the processor can do, as far as the system tells."""
    return " ".join(sorted(flags())) or platform.processor()


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.step.argtypes, found.step.restype = [pointer, pointer], None
    found.linear.argtypes, found.linear.restype = [pointer, pointer, pointer, number, number, number], None
    return found
