"""How kernels of Triton are tried: in its interpreter or on a device, and compiled for cards that are not there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed (pip install triton)")
CARDS = {"A100": (80, 163), "RTX 3090": (86, 99), "H100": (90, 227)}  # architecture, KiB of shared memory a program


def run_cases(repository: Path, files: Sequence[Path], marker: str, *, interpret: bool) -> None:
    """Run files of cases in a process of its own, for Triton reads once whether it interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0"}
    command = [sys.executable, "-m", "pytest", *map(str, files), "-q", "-m", marker, "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "--tb=short"], cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def in_python(source, **environment):
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, env=os.environ | environment
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


class NoDevice:
    """Enough of a driver for Triton to compile for a card that is not there; each card counts as a device."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0
