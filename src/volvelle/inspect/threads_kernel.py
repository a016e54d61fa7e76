"""What the Linux kernel says about the threads of a process: one folder a thread in /proc/PID/task."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
STATES: Mapping[str, str] = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for disk",
    "T": "stopped",
    "t": "traced",
    "Z": "zombie",
    "X": "dead",
    "I": "idle",
}
_LONGEST_DESCRIPTOR = 4096  # bytes of a thread descriptor that are searched for its id


@dataclass(frozen=True)
class KernelThread:
    """One thread as the kernel knows it; times in seconds of CPU since it began, `cpu` the core it last ran on."""

    native_id: int
    name: str
    state: str
    user_seconds: float
    system_seconds: float
    cpu: int


def kernel_threads(pid: int, proc: Path = PROC) -> list[KernelThread]:
    """Every thread of process `pid`, the main one first, then by native id. Threads that end meanwhile are left out.

    FileNotFoundError when there is no such process, PermissionError when /proc hides it.
    """
    found = []
    for folder in (proc / str(pid) / "task").iterdir():
        # A thread may end between the listing and the reading; reading then says "no such process".
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(_parse((folder / "stat").read_text(errors="replace")))
    # Native ids begin anew at some height: a later thread's may be the lower one.
    return sorted(found, key=lambda thread: (thread.native_id != pid, thread.native_id))


def _parse(stat: str) -> KernelThread:
    # The name stands in parentheses and may itself hold spaces and parentheses: the last one closes it.
    head, _, tail = stat.rpartition(")")
    number, _, name = head.partition("(")
    fields = tail.split()
    tick = os.sysconf("SC_CLK_TCK")
    return KernelThread(
        native_id=int(number),
        name=name,
        state=STATES.get(fields[0], fields[0]),
        user_seconds=int(fields[11]) / tick,
        system_seconds=int(fields[12]) / tick,
        cpu=int(fields[36]),
    )


def native_ids(unknown: Iterable[int], known: Mapping[int, int], candidates: set[int]) -> dict[int, int]:
    """Native ids of threads of this process of which only the interpreter's ident is known.

    Threads started by `_thread` or by C code have an ident (pthread_self) but no native id in `threading`. With glibc
    the ident is the address of the thread's descriptor, which holds the native id at a fixed place. The place is not
    assumed: it is found with the threads in `known` (ident -> native id), and an answer counts only when it is one of
    `candidates`. Returns what could be found.
    """
    unknown = list(unknown)
    if not unknown or not known or not sys.platform.startswith("linux"):
        return {}
    try:
        places = set.intersection(*(_places(ident, native) for ident, native in known.items()))
        found = {ident: {_number(ident + place) for place in places} & candidates for ident in unknown}
    except OSError:
        return {}  # another C library: an ident is no address there
    return {ident: ids.pop() for ident, ids in found.items() if len(ids) == 1}


def _places(ident: int, native_id: int) -> set[int]:
    size = ctypes.sizeof(ctypes.c_int)
    found = set()
    for place in range(0, _LONGEST_DESCRIPTOR, size):
        try:
            if _number(ident + place) == native_id:
                found.add(place)
        except OSError:
            break  # the descriptor ends before the page does
    return found


def _number(address: int) -> int:
    # Through /proc/self/mem a wrong address is an error, not a crash.
    file = os.open(PROC / "self" / "mem", os.O_RDONLY)
    try:
        return int.from_bytes(os.pread(file, ctypes.sizeof(ctypes.c_int), address), sys.byteorder)
    finally:
        os.close(file)


def python_processes(proc: Path = PROC) -> list[tuple[int, str]]:
    """Process id and command line of this user's other Python processes, oldest first."""
    found = []
    for folder in proc.iterdir() if proc.is_dir() else ():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if folder.stat().st_uid == os.getuid() and "python" in Path(words[0]).name:
                found.append((int(folder.name), " ".join(words).strip()))
    return sorted(found)
