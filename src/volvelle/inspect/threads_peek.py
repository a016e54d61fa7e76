"""The Python side of another process: asked of the process itself when it answers, else of py-spy when installed.

A process answers after `answer_threads()`: a daemon thread of it listens on an abstract Unix socket named after its
process id, and tells its Python threads to processes of the same user, and to nobody else.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_SECONDS = 10.0
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid of the process at the other end


@dataclass(frozen=True)
class Frame:
    """One call on a Python stack."""

    function: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.function} ({self.file}:{self.line})"


@dataclass(frozen=True)
class PythonThread:
    """One thread as the interpreter knows it. The innermost call is the last of `stack`."""

    ident: int
    native_id: int | None
    name: str | None
    daemon: bool | None
    stack: tuple[Frame, ...]


@dataclass(frozen=True)
class Answer:
    """Python threads of a process, who told, and why a better source was not used."""

    threads: list[PythonThread]
    source: str
    notes: tuple[str, ...] = ()


def own_threads() -> list[PythonThread]:
    """The Python threads of this process, those that `threading` does not know included."""
    known = {thread.ident: thread for thread in threading.enumerate()}
    found = []
    for ident, frame in sys._current_frames().items():
        thread, stack = known.get(ident), []
        call = frame
        while call is not None:
            code = call.f_code
            stack.append(Frame(code.co_qualname, code.co_filename, call.f_lineno or code.co_firstlineno))
            call = call.f_back
        name, daemon, native = (thread.name, thread.daemon, thread.native_id) if thread else (None, None, None)
        found.append(PythonThread(ident, native, name, daemon, tuple(reversed(stack))))
    return found


def ask(pid: int) -> Answer:
    """The Python threads of another process, with stacks where a source for them exists."""
    with contextlib.suppress(ConnectionError, FileNotFoundError):
        return Answer(_ask_process(pid), "the process itself")
    spy = _spy()
    if spy is None:
        return Answer([], "", ("no Python stacks: the process does not answer, and py-spy is not installed",))
    command = [spy, "dump", "--json", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Answer([], "", ("no Python stacks: py-spy gets no answer from the process: is it stopped?",))
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[0].removeprefix("Error: ")
        return Answer([], "", (f"no Python stacks: py-spy says: {why}",))
    return Answer(list(map(_of_spy, json.loads(done.stdout))), "py-spy")


def _spy() -> str | None:
    """py-spy of this environment, which need not be on the path, or any other."""
    return shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")


def _of_spy(thread: dict[str, Any]) -> PythonThread:
    frames = (Frame(f["name"], f["filename"], f["line"]) for f in reversed(thread["frames"]))
    return PythonThread(thread["thread_id"], thread["os_thread_id"], thread["thread_name"], None, tuple(frames))


def answer_threads() -> None:
    """Let `live_threads(pid)` in other processes of the same user see this process's Python stacks (Linux).

    A second call does nothing. Costs a sleeping daemon thread.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.bind(_address(os.getpid()))
    except OSError:  # it answers already
        server.close()
        return
    server.listen()
    threading.Thread(target=_serve, args=(server, os.getpid()), name="volvelle-threads", daemon=True).start()


def _serve(server: socket.socket, pid: int) -> None:
    while os.getpid() == pid:
        with contextlib.suppress(OSError):
            client, _ = server.accept()
            with client:
                client.settimeout(_SECONDS)
                if _peer(client)[1] in (os.getuid(), 0):
                    client.sendall(json.dumps([asdict(thread) for thread in own_threads()]).encode())


def _ask_process(pid: int) -> list[PythonThread]:
    if not hasattr(socket, "SO_PEERCRED"):
        raise FileNotFoundError("no such sockets on this system")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(_SECONDS)
        try:
            client.connect(_address(pid))
            # Anybody may take a name; only the process itself may answer for itself.
            if _peer(client)[0] != pid:
                raise ConnectionRefusedError(f"process {_peer(client)[0]} answers for {pid}")
            text = b"".join(iter(lambda: client.recv(1 << 16), b""))
        except TimeoutError as error:
            raise ConnectionAbortedError(f"process {pid} does not answer: is it stopped?") from error
    if not text:
        raise ConnectionRefusedError(f"process {pid} belongs to another user")
    return [
        PythonThread(**{**thread, "stack": tuple(Frame(**frame) for frame in thread["stack"])})
        for thread in json.loads(text)
    ]


def _peer(connection: socket.socket) -> tuple[int, int, int]:
    option = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(option)  # pyright: ignore[reportReturnType]


def _address(pid: int) -> str:
    return f"\0volvelle-threads-{pid}"
