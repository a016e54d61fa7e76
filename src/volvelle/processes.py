"""Processes by what names them for good: a pid alone is given to another one, after a reboot at the latest."""

from __future__ import annotations

from pathlib import Path


def birth(pid: int) -> str:
    """When the process started: this boot of the machine, and clock ticks since. Empty where none has that pid.

    >>> import os
    >>> birth(os.getpid()) == birth(os.getpid()) != birth(2**22 + 1) == ""
    True
    """
    fields = stat_fields(pid)
    return f"{_boot()}/{fields[19]}" if fields else ""


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on: the second, the name, may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
