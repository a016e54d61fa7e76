"""How batches travel from a worker process: pickled, with large arrays and tensors in memory that both sides map.

The memory comes from memfd_create: it has no name and no file system, so a full or tiny /dev/shm does not matter and
nothing is left behind when a process is killed. Where there is none, or the system refuses, the same bytes go through
the pipe, and the reason goes with them.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import socket
import sys
import traceback
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from volvelle.errors import VolvelleError

_SMALL = 1024  # bytes; below, a buffer travels inside the pickle
_ALIGN = 64  # bytes; start of every buffer in the shared memory
_MOST_MAPPED = 64  # blocks mapped at once; each holds a file descriptor, and those are scarce
# References without callbacks: Python code that runs while a block is freed would swallow a Ctrl-C that arrives there.
_mapped: list[weakref.ref[mmap.mmap]] = []


class Head(NamedTuple):
    """What goes ahead of a value: which one it is, the sizes of its buffers, and how they come."""

    number: int
    failed: bool
    sizes: list[int]
    shared: bool
    refused: str | None
    """Why shared memory was not used although the system has it."""


class Failure(NamedTuple):
    """An exception as it travels: exceptions themselves do not always survive pickling."""

    message: str
    tip: str | None
    trace: str
    whole: bool = False
    """It is about the whole batch: no sample is named yet."""

    def error(self, more: str = "") -> VolvelleError:
        """The exception to raise on the other side, with the worker's traceback as a note."""
        error = VolvelleError(self.message + more, tip=self.tip)
        error.add_note(f"in the worker process:\n{self.trace}")
        return error


def told(error: BaseException) -> str:
    """An exception in a line; one that cannot even be printed has only its type."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - a foreign class
        return type(error).__name__


class Message(NamedTuple):
    """A value that arrived; with `failed`, a Failure."""

    number: int
    failed: bool
    value: Any
    refused: str | None


class Channel:
    """One end of a pipe between processes that carries values. Sending and receiving are for one thread each."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self._socket = None
        if hasattr(os, "memfd_create") and hasattr(socket, "send_fds"):
            self._socket = socket.socket(fileno=os.dup(connection.fileno()))

    def send(self, number: int, value: Any, *, failed: bool = False) -> None:
        """Send a value; raises what pickling raises, before anything was sent."""
        text, buffers = _pickled(value)
        sizes = [view.nbytes for view in buffers]
        memory, refused = None, None
        if self._socket and buffers:
            try:
                memory = _shared(buffers)
            except OSError as error:
                refused = f"{error.strerror} for {sum(sizes):,} bytes"
        head = Head(number, failed, sizes, memory is not None, refused)
        self.connection.send_bytes(pickle.dumps(head))
        self.connection.send_bytes(text)
        if memory is not None:
            assert self._socket is not None
            socket.send_fds(self._socket, [b"m"], [memory])
            os.close(memory)
        else:
            for view in buffers:
                self.connection.send_bytes(view)

    def receive(self) -> Message:
        """Wait for the next value. EOFError or OSError when the other side is gone."""
        head: Head = pickle.loads(self.connection.recv_bytes())
        text = self.connection.recv_bytes()
        if head.shared:
            assert self._socket is not None
            _, files, _, _ = socket.recv_fds(self._socket, 1, 1)
            if not files:
                raise EOFError
            buffers = _mapped_views(files[0], head.sizes)
        else:
            # bytearray: tensors and arrays on top of it can be written to.
            buffers = [memoryview(bytearray(self.connection.recv_bytes())) for _ in head.sizes]
        try:
            value, failed = pickle.loads(text, buffers=buffers), head.failed
        except Exception as error:  # noqa: BLE001 - unpickling runs the values' own code, which may raise anything
            message = f"a batch cannot be unpacked: {told(error)}"
            value, failed = Failure(message, None, traceback.format_exc(), whole=True), True
        return Message(head.number, failed, value, head.refused)

    def close(self) -> None:
        """Close this end."""
        self.connection.close()
        if self._socket:
            self._socket.close()


def _pickled(value: Any) -> tuple[memoryview, list[memoryview]]:
    buffers: list[memoryview] = []

    def keep_out(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < _SMALL:
            return True
        buffers.append(view)
        return False

    text = io.BytesIO()
    _Pickler(text, protocol=5, buffer_callback=keep_out).dump(value)
    return text.getbuffer(), buffers


class _Pickler(pickle.Pickler):
    """numpy arrays leave their data out of the pickle by themselves; plain CPU tensors need to be told how."""

    def reducer_override(self, obj: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is None or type(obj) is not torch.Tensor or not obj.numel():
            return NotImplemented
        if obj.requires_grad or obj.device.type != "cpu" or obj.layout != torch.strided or obj.is_quantized:
            return NotImplemented
        flat = obj.resolve_conj().resolve_neg().contiguous().reshape(-1)
        return _tensor, (pickle.PickleBuffer(flat.view(torch.uint8).numpy()), obj.dtype, tuple(obj.shape))


def _tensor(buffer: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    import torch

    return torch.frombuffer(buffer, dtype=dtype).reshape(shape)


def _shared(buffers: Sequence[memoryview]) -> int:
    """File descriptor of new memory that holds the buffers one after the other."""
    file = os.memfd_create("volvelle-batch")
    try:
        for view, begin in zip(buffers, _begins([v.nbytes for v in buffers]), strict=True):
            # Writing, unlike mapping, fails here and now when memory is short; a mapping would kill with SIGBUS later.
            done = 0
            while done < view.nbytes:
                done += os.pwrite(file, view[done:], begin + done)
    except OSError:
        os.close(file)
        raise
    return file


def _mapped_views(file: int, sizes: Sequence[int]) -> list[memoryview]:
    try:
        begins = _begins(sizes)
        if len(_mapped) >= _MOST_MAPPED:
            _mapped[:] = [block for block in _mapped if block() is not None]
        if len(_mapped) >= _MOST_MAPPED:
            # The caller keeps many batches: copy this one, or file descriptors run out.
            views = [memoryview(bytearray(size)) for size in sizes]
            for view, begin in zip(views, begins, strict=True):
                done = 0
                while done < view.nbytes:
                    done += os.preadv(file, [view[done:]], begin + done)
            return views
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        block = mmap.mmap(file, begins[-1] + sizes[-1], flags=flags)
        _mapped.append(weakref.ref(block))
        return [memoryview(block)[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)]
    finally:
        os.close(file)


def _begins(sizes: Sequence[int]) -> list[int]:
    begins, end = [], 0
    for size in sizes:
        begins.append(end)
        end += -(-size // _ALIGN) * _ALIGN
    return begins
