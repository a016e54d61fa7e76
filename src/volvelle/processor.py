"""What the processor says of itself; without torch, so that a help text may ask."""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
BF16 = frozenset({"amx_bf16", "avx512_bf16"})
"""The instruction sets with products of bf16: without one, fp32 is the faster precision."""


def flags() -> frozenset[str]:
    """The instruction sets of the first processor in /proc/cpuinfo; empty where there is no such file (not Linux)."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    found = (line for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(found, "").partition(":")[2].split())


def bf16_flags() -> frozenset[str]:
    """Those of the processor's instruction sets that multiply bf16.

    >>> bf16_flags() <= BF16
    True
    """
    return flags() & BF16
