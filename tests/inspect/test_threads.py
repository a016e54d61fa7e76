"""Threads of this process and of others: nothing missing, nothing invented, errors named."""

import _thread
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from volvelle.cli.main import main
from volvelle.errors import VolvelleError
from volvelle.inspect import live_threads, threads, threads_kernel, threads_peek

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
pytestmark = linux

SLEEPER = """
import threading, time
def nap():
    time.sleep(60)
threading.Thread(target=nap, name="napping", daemon=True).start()
{extra}
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def child():
    """Start a Python process with a thread called `napping`; ended afterwards."""
    started = []

    def start(extra=""):
        process = subprocess.Popen([sys.executable, "-c", SLEEPER.format(extra=extra)], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def no_spy(monkeypatch):
    monkeypatch.setattr(threads_peek, "_spy", lambda: None)


def test_python_threads_carry_name_native_id_and_stack():
    stop, natives = threading.Event(), []

    def wait_for_the_end():
        natives.append(threading.get_native_id())
        stop.wait()

    thread = threading.Thread(target=wait_for_the_end, name="the waiter", daemon=True)
    thread.start()
    try:
        # Seen at rest: a thread that has only just begun may be anywhere on its way into the wait.
        while not (found := _waiting(natives)):
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join()
    assert (found.name, found.kind, found.daemon, found.ident) == ("the waiter", "python", True, thread.ident)
    assert any("wait_for_the_end" in frame.function and frame.file == __file__ for frame in found.stack)
    deadline = time.monotonic() + 30
    # join() returns when the interpreter is done with the thread; the kernel's own end comes a moment later.
    while natives[0] in {t.native_id for t in live_threads()}:
        assert time.monotonic() < deadline, "a thread that ended is still listed"
        time.sleep(0.01)


def _waiting(natives):
    for thread in live_threads():
        if thread.native_id in natives and thread.stack and thread.stack[-1].function == "Condition.wait":
            return thread
    return None


def test_the_list_is_the_kernels():
    import torch

    torch.mm(torch.ones(300, 300), torch.ones(300, 300))  # OpenMP's threads, if any, begin here
    for _ in range(100):  # threads that other tests left may end between the two readings
        report = live_threads()
        listed = {int(name) for name in os.listdir("/proc/self/task")}
        if {t.native_id for t in report} == listed:
            break
    assert {t.native_id for t in report} == listed
    assert report.sources == ("/proc", "the interpreter")
    assert report.notes == ()


def test_a_native_thread_is_listed_as_such():
    """A thread that C code made: the reading thread of a C library's timer, here a pthread from ctypes."""
    import ctypes

    libc = ctypes.CDLL(None)
    thread = ctypes.c_ulong()
    sleep = ctypes.cast(libc.sleep, ctypes.c_void_p)  # pthread_create(sleep, 2): no interpreter in it
    before = {t.native_id for t in live_threads()}
    assert libc.pthread_create(ctypes.byref(thread), None, sleep, ctypes.c_void_p(1)) == 0
    (new,) = (t for t in live_threads() if t.native_id not in before)
    libc.pthread_join(thread, None)
    assert (new.kind, new.stack, new.ident) == ("native", (), None)


def test_a_thread_unknown_to_threading_is_matched_to_its_native_id():
    natives, stop = [], threading.Lock()
    stop.acquire()

    def body():
        natives.append(_thread.get_native_id())
        with stop:
            pass

    _thread.start_new_thread(body, ())
    while not natives:
        time.sleep(0.01)
    found = [t for t in live_threads() if t.native_id == natives[0]]
    stop.release()
    assert [(t.kind, t.daemon) for t in found] == [("python", None)]
    assert "body" in found[0].stack[-1].function


def test_native_ids_are_not_guessed():
    ident, native = threading.get_ident(), threading.get_native_id()
    assert threads_kernel.native_ids([ident], {ident: native}, {native}) == {ident: native}
    assert threads_kernel.native_ids([ident], {ident: native}, {native + 1}) == {}
    assert threads_kernel.native_ids([8], {ident: native}, {native}) == {}  # no such address
    assert threads_kernel.native_ids([ident], {}, {native}) == {}


def test_cpu_time_is_counted_for_the_thread_that_spends_it():
    def total():
        return next(t.cpu_seconds for t in live_threads() if t.native_id == threading.get_native_id())

    before, clock = total(), time.thread_time()
    while time.thread_time() - clock < 0.3:
        sum(range(1000))
    spent = total() - before
    assert 0.2 < spent < 0.5


def test_names_with_parentheses_and_spaces_are_read(tmp_path):
    task = tmp_path / "7" / "task" / "9"
    task.mkdir(parents=True)
    fields = ["D", *["0"] * 10, "200", "100", *["0"] * 23, "3", "0"]
    (task / "stat").write_text(f"9 (a) R (b) {' '.join(fields)}\n")
    (tmp_path / "7" / "task" / "10").mkdir()  # ended while we looked: its stat file is gone
    (found,) = threads_kernel.kernel_threads(7, tmp_path)
    tick = os.sysconf("SC_CLK_TCK")
    assert found == threads_kernel.KernelThread(9, "a) R (b", "waiting for disk", 200 / tick, 100 / tick, 3)


def test_the_main_thread_comes_first_where_numbers_began_anew(tmp_path):
    fields = " ".join(["S", *["0"] * 37])
    for number in (40, 9, 3):
        (tmp_path / "9" / "task" / str(number)).mkdir(parents=True)
        (tmp_path / "9" / "task" / str(number) / "stat").write_text(f"{number} (x) {fields}\n")
    assert [t.native_id for t in threads_kernel.kernel_threads(9, tmp_path)] == [9, 3, 40]


def test_another_process_from_proc_alone_says_what_is_missing(child, no_spy):
    process = child()
    report = live_threads(process.pid)
    assert len(report) == 2
    assert {(t.kind, t.stack) for t in report} == {("unknown", ())}
    assert report.sources == ("/proc",)
    assert report.notes == ("no Python stacks: the process does not answer, and py-spy is not installed",)


def test_another_process_that_answers(child, no_spy):
    process = child("from volvelle.inspect import answer_threads; answer_threads(); answer_threads()")
    report = live_threads(process.pid)
    assert report.sources == ("/proc", "the process itself")
    found = {t.name: t for t in report}
    assert set(found) == {"MainThread", "napping", "volvelle-threads"}
    assert found["napping"].stack[-1].function == "nap"
    assert found["napping"].state == "sleeping"
    assert found["MainThread"].native_id == process.pid


@pytest.mark.parametrize("extra", ["", "from volvelle.inspect import answer_threads; answer_threads()"])
def test_a_stopped_process_does_not_hang_us(child, no_spy, monkeypatch, extra):
    monkeypatch.setattr(threads_peek, "_SECONDS", 0.5)
    process = child(extra)
    process.send_signal(signal.SIGSTOP)
    while {t.state for t in live_threads(process.pid)} != {"stopped"}:
        time.sleep(0.01)
    report = live_threads(process.pid)
    assert any("does not answer" in note for note in report.notes)


def test_nobody_answers_for_another(child, no_spy):
    """A third process that takes the name of the socket is not believed."""
    import socket

    process = child()
    with socket.socket(socket.AF_UNIX) as impostor:
        impostor.bind(threads_peek._address(process.pid))
        impostor.listen()
        assert live_threads(process.pid).sources == ("/proc",)


@pytest.mark.skipif(threads_peek._spy() is None, reason="py-spy is not installed")
def test_another_process_through_py_spy(child):
    report = live_threads(child().pid)
    if report.notes:
        pytest.skip(report.notes[0])  # no permission to trace here
    assert {t.stack[-1].function for t in report} == {"nap", "<module>"}
    assert "py-spy" in report.sources


def test_py_spy_output_is_read(child, monkeypatch, tmp_path):
    process = child()
    frames = [{"name": "inner", "filename": "a.py", "line": 3}, {"name": "outer", "filename": "a.py", "line": 9}]
    dump = [{"thread_id": 5, "os_thread_id": process.pid, "thread_name": "Main", "frames": frames}]
    spy = tmp_path / "py-spy"
    spy.write_text(f"#!/bin/sh\necho '{json.dumps(dump)}'\n")
    spy.chmod(0o755)
    monkeypatch.setattr(threads_peek, "_spy", lambda: str(spy))
    report = live_threads(process.pid)
    assert [f.function for f in report.threads[0].stack] == ["outer", "inner"]
    assert {t.kind for t in report} == {"python", "native"}
    spy.write_text("#!/bin/sh\nprintf 'Error: Permission Denied: try sudo\\n\\nCaused by:\\n 0: x' >&2\nexit 1\n")
    assert live_threads(process.pid).notes == ("no Python stacks: py-spy says: Permission Denied: try sudo",)


@pytest.mark.parametrize("spy", ["installed", "hanging"])
def test_py_spy_on_a_stopped_process_does_not_hang_us(child, monkeypatch, tmp_path, spy):
    if spy == "hanging":
        script = tmp_path / "py-spy"
        script.write_text("#!/bin/sh\nexec sleep 60\n")
        script.chmod(0o755)
        monkeypatch.setattr(threads_peek, "_spy", lambda: str(script))
    elif threads_peek._spy() is None:
        pytest.skip("py-spy is not installed")
    monkeypatch.setattr(threads_peek, "_SECONDS", 2.0)
    process = child()
    process.send_signal(signal.SIGSTOP)
    report = live_threads(process.pid)
    assert len(report) == 2
    if not any(t.stack for t in report):
        assert "no Python stacks: py-spy" in report.notes[0]


def test_a_missing_process_is_an_error():
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(VolvelleError, match=f"there is no process {process.pid}"):
        live_threads(process.pid)
    with pytest.raises(VolvelleError, match="there is no process -1"):
        live_threads(-1)


def test_a_hidden_process_is_an_error(monkeypatch):
    def hidden(pid):
        raise PermissionError

    monkeypatch.setattr(threads, "kernel_threads", hidden)
    with pytest.raises(VolvelleError, match="no permission to look at process 1"):
        live_threads(1)


def test_without_proc_the_own_process_is_what_the_interpreter_knows(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "PROC", tmp_path)
    report = live_threads()
    assert "MainThread" in {t.name for t in report}
    assert {(t.kind, t.state, t.cpu_seconds) for t in report} == {("python", None, None)}
    assert report.notes == ("no /proc on this system: native threads, CPU times and states are missing",)
    with pytest.raises(VolvelleError, match="this system has no /proc"):
        live_threads(1)


def test_verb(capsys, child, no_spy):
    process = child("from volvelle.inspect import answer_threads; answer_threads()")
    assert main(["inspect", "threads", f"pid={process.pid}", "stacks=true"]) == 0
    text = capsys.readouterr().out
    assert f"process {process.pid}: 3 threads, 3 of them Python's" in text
    assert "nap (<string>:" in text
    assert main(["inspect", "threads", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["pid"] == os.getpid()
    assert "MainThread" in {t["name"] for t in record["threads"]}
    assert main(["inspect", "threads", "pid=999999999"]) == 1
    assert "error: live_threads: there is no process 999999999" in capsys.readouterr().err
