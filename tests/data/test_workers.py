"""Loader workers: the same batches whatever reads them, and no way for a worker to fail in silence."""

import gc
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from volvelle.data import transport, workers
from volvelle.data.loader import Loader
from volvelle.errors import VolvelleError

KINDS = ("threads", "processes")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")


class Images:
    """Tensors of differing sizes, read with a delay that makes workers finish out of order."""

    def __init__(self, count=23, delay=0.002):
        self.count, self.delay = count, delay

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        time.sleep(self.delay * ((i * 7) % 5))
        return torch.full((2, 40, 30), float(i)), np.arange(i * 100), f"{i}.jpg"

    def source(self, i):
        return f"images/{i}.jpg"


class Trouble(Images):
    """Sample 11 does what it is told."""

    def __init__(self, act, count=23):
        super().__init__(count, delay=0)
        self.act = act

    def __getitem__(self, i):
        if i == 11:
            self.act()
        return i


def kill_self(number):
    return lambda: os.kill(os.getpid(), number)


def children():
    return {process.pid for process in multiprocessing.active_children() if process.name.startswith("loader-")}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def make(dataset=None, batch=4, **options):
    return Loader(dataset or Images(), batch, collate=list, **({"seed": 5} | options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "prefetch"), [(1, 1), (2, 2), (5, 3)])
def test_batches_are_the_same_for_any_workers(kind, count, prefetch):
    plain, loader = make(), make(workers=kind, num_workers=count, prefetch=prefetch)
    for _ in range(2):  # the second epoch reuses the workers
        assert all(a.ids == b.ids and same(a.value, b.value) for a, b in zip(plain, loader, strict=True))
    assert loader.state_dict() == plain.state_dict()
    loader.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [0, 1, 3, 6])
def test_resumes_mid_epoch_whatever_was_read_ahead(kind, stop):
    def stream(loader):
        while True:
            yield from loader

    expected = [batch.ids for batch, _ in zip(stream(make()), range(12), strict=False)]
    first = make(workers=kind, num_workers=3)
    begun = stream(first)
    got = [next(begun).ids for _ in range(stop)]
    state = json.loads(json.dumps(first.state_dict()))
    begun.close()
    second = make(workers=kind, num_workers=2)
    second.load_state_dict(state)
    got += [batch.ids for batch, _ in zip(stream(second), range(12 - stop), strict=False)]
    assert got == expected


class Augmented(Images):
    def draw(self, i, generator):
        return i, generator.random()


@pytest.mark.parametrize("kind", KINDS)
def test_random_augmentation_depends_on_seed_epoch_and_sample_only(kind):
    plain, loader = make(Augmented()), make(Augmented(), batch=3, workers=kind, num_workers=3)
    first, second = ({i: x for batch in plain for i, x in batch.value} for _ in range(2))
    assert {i: x for batch in loader for i, x in batch.value} == first
    assert {i: x for batch in loader for i, x in batch.value} == second
    assert len(set(first.values()) | set(second.values())) == 46


class Careless(Images):
    """Draws from the global generators."""

    def __getitem__(self, i):
        return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_global_generators_do_not_repeat_in_processes():
    drawn = [[x for b in make(Careless(), workers="processes", num_workers=n) for x in b.value] for n in (1, 3)]
    assert drawn[0] == drawn[1]
    for column in zip(*drawn[0], strict=True):
        assert len(set(column)) == 23


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_names_the_sample(kind, count):
    def fail():
        raise OSError("image file is truncated")

    loader = make(Trouble(fail), workers=kind, num_workers=count)
    with pytest.raises(VolvelleError, match=r"cannot read images/11.jpg: OSError: image file is truncated") as caught:
        list(loader)
    if kind == "processes" and count:
        assert "in fail" in caught.value.__notes__[0]
    wait_until(lambda: not children())


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_that_explains_itself_stays_as_it_is(kind):
    def fail():
        raise VolvelleError("11.jpg: not a JPEG", tip="remove it")

    with pytest.raises(VolvelleError, match=r"^11.jpg: not a JPEG(\n|$)") as caught:
        list(make(Trouble(fail), workers=kind, num_workers=2))
    assert caught.value.tip == "remove it"


@pytest.mark.parametrize("kind", KINDS)
def test_batches_before_the_bad_one_still_arrive(kind):
    def fail():
        raise ValueError("bad")

    loader = make(Trouble(fail), shuffle=False, workers=kind, num_workers=3)
    batches = iter(loader)
    assert [next(batches).value for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(VolvelleError, match="bad"):
        next(batches)
    assert loader.position == 2


@linux
@pytest.mark.parametrize(
    ("act", "says"),
    [
        (kill_self(signal.SIGKILL), "was killed by SIGKILL while reading images/11.jpg"),
        (kill_self(signal.SIGSEGV), "was killed by SIGSEGV while reading images/11.jpg"),
        (lambda: os._exit(3), "ended with exit code 3 while reading images/11.jpg"),
    ],
)
def test_a_worker_that_dies_is_named_with_its_sample(act, says):
    with pytest.raises(VolvelleError, match=f"loader worker . .process [0-9]*. {says}"):
        list(make(Trouble(act), workers="processes", num_workers=2))
    wait_until(lambda: not children())


@linux
def test_a_worker_killed_from_outside_is_noticed():
    loader = make(Images(400, delay=0.01), workers="processes", num_workers=2)
    begun = iter(loader)
    next(begun)
    victim = loader._pool.process_ids[0]
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(VolvelleError, match=rf"process {victim}. was killed by SIGKILL") as caught:
        list(begun)
    assert "memory" in caught.value.tip
    assert len(next(iter(loader)).ids) == 4  # and the loader can go on, with new workers
    loader.close()


@linux
def test_system_exit_in_a_worker_is_an_error():
    with pytest.raises(VolvelleError, match="SystemExit"):
        list(make(Trouble(lambda: sys.exit(0)), workers="processes", num_workers=2))


def test_what_cannot_be_sent_is_said():
    loader = Loader(range(8), 4, seed=0, collate=lambda items: threading.Lock(), workers="processes", num_workers=1)
    with pytest.raises(VolvelleError, match="a batch cannot be sent from a worker process: TypeError: cannot pickle"):
        list(loader)


class Unsendable(Images):
    """Sample 11 holds what cannot be pickled."""

    def __getitem__(self, i):
        return (lambda: i) if i == 11 else i


def test_a_sample_that_cannot_be_sent_is_looked_for_in_its_batch():
    loader = make(Unsendable(), shuffle=False, workers="processes", num_workers=2)
    with pytest.raises(VolvelleError, match=r"a batch cannot be sent from a worker process: .*pickle") as caught:
        list(loader)
    assert str(caught.value).endswith("; the batch holds images/8.jpg, images/9.jpg, images/10.jpg and 1 more")
    assert "workers=threads" in caught.value.tip
    wait_until(lambda: not children())
    assert len(list(make(Unsendable(), workers="threads", num_workers=2))) == 6  # nothing needs to be sent there


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_that_cannot_be_printed_is_still_an_error(kind):
    def fail():
        raise Unspeakable

    with pytest.raises(VolvelleError, match=r"cannot read images/11.jpg: Unspeakable"):
        list(make(Trouble(fail), workers=kind, num_workers=2))


class Poison:
    def __reduce__(self):
        return int, ("no number",)


def test_what_cannot_be_unpacked_is_said():
    loader = Loader(range(8), 4, seed=0, collate=lambda items: Poison(), workers="processes", num_workers=1)
    with pytest.raises(VolvelleError, match=r"a batch cannot be unpacked: ValueError: invalid literal.*sample \d, "):
        list(loader)


def test_spawned_workers_need_a_dataset_that_can_be_sent(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none=False: "spawn")
    with pytest.raises(VolvelleError, match="the dataset cannot be sent to a worker process") as caught:
        list(make(Trouble(lambda: None), workers="processes", num_workers=2))
    assert "workers=threads" in caught.value.tip
    wait_until(lambda: not children())


@pytest.mark.slow
def test_spawned_workers_give_the_same_batches(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none=False: "spawn")
    loader = Loader(range(23), 4, seed=5, collate=list, workers="processes", num_workers=2)
    assert [b.value for b in loader] == [b.value for b in Loader(range(23), 4, seed=5, collate=list)]
    loader.close()


class Counted(Images):
    """Counts how many samples were read, across processes."""

    def __init__(self, count):
        super().__init__(count, delay=0)
        self.read = multiprocessing.get_context("fork").Value("q", 0)

    def __getitem__(self, i):
        with self.read.get_lock():
            self.read.value += 1
        return i


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_is_read_ahead_than_allowed(kind):
    dataset = Counted(400)
    loader = make(dataset, batch=2, workers=kind, num_workers=3, prefetch=2)
    for given, _ in enumerate(loader, 1):
        if given in {1, 10}:
            time.sleep(0.3)  # ample time to run away
            assert dataset.read.value == 2 * (given + 3 * 2)
        if given == 20:
            break
    loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_early_and_dropping_the_loader_end_the_workers(kind):
    def alive():
        return len(children()) + sum(thread.name.startswith("loader-") for thread in threading.enumerate())

    loader = make(workers=kind, num_workers=2)
    for _ in loader:
        break
    wait_until(lambda: alive() == 0)
    assert len(list(loader)) == 5  # the rest of the epoch
    assert alive() >= 2
    del loader
    gc.collect()
    wait_until(lambda: alive() == 0)


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@linux
def test_a_stopped_worker_does_not_hold_up_closing():
    loader = make(workers="processes", num_workers=2)
    begun = iter(loader)
    next(begun)
    os.kill(loader._pool.process_ids[1], signal.SIGSTOP)
    loader.close()
    wait_until(lambda: not children())
    with pytest.raises(VolvelleError, match="the loader was closed"):
        list(begun)


VALUES = [
    torch.randn(300, 7),
    torch.randn(40, 50)[:, ::3],  # not contiguous
    torch.randn(1000).to(torch.bfloat16),
    torch.ones(2000, dtype=torch.bool),
    torch.randn(400, dtype=torch.complex64).conj(),
    torch.empty(0, 3),
    torch.tensor(3),
    torch.nn.Parameter(torch.randn(600)),
    np.arange(5000, dtype=np.int16).reshape(50, 100),
    np.asfortranarray(np.random.rand(40, 50)),
    {"a": [torch.zeros(1000), "text", None], "b": b"x" * 5000},
]


@pytest.fixture(params=["shared memory", "pipe"])
def ends(request, monkeypatch):
    if request.param == "pipe":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    one, two = multiprocessing.Pipe(duplex=True)
    left, right = transport.Channel(one), transport.Channel(two)
    yield left, right
    left.close()
    right.close()


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_values_arrive_unchanged_and_can_be_written(ends, value):
    left, right = ends
    left.send(3, value)
    message = right.receive()
    assert (message.number, message.failed, message.refused) == (3, False, None)
    if isinstance(value, dict):
        assert list(message.value) == ["a", "b"]
        assert all(same(value[k], message.value[k]) for k in value)
    else:
        assert same(value, message.value)
        if value.size if isinstance(value, np.ndarray) else value.numel():
            with torch.no_grad():
                message.value[...] = 1


@linux
def test_file_descriptors_do_not_run_out():
    before = len(os.listdir("/proc/self/fd"))
    loader = make(Images(600, delay=0), batch=1, workers="processes", num_workers=2)
    kept = list(loader)
    assert len(os.listdir("/proc/self/fd")) - before < 100
    assert all(float(batch.value[0][0].mean()) == batch.ids[0] for batch in kept)
    loader.close()


@linux
def test_refused_shared_memory_is_said_and_the_pipe_used(monkeypatch):
    def refuse(name):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "memfd_create", refuse)  # inherited by the fork
    loader = make(workers="processes", num_workers=2)
    with pytest.warns(RuntimeWarning, match="shared memory refused .No space left on device"):
        assert all(same(a.value, b.value) for a, b in zip(loader, make(), strict=True))
    loader.close()


SCRIPT = """
import sys, time
from volvelle.data.loader import Loader
import numpy as np
class Slow:
    def __len__(self): return 1000
    def __getitem__(self, i):
        time.sleep({delay})
        return np.full(100_000, i)
def go():
    loader = Loader(Slow(), 2, seed=0, collate=list, workers="{kind}", num_workers=2)
    print("begin", flush=True)
    for n, batch in enumerate(loader):
        if n == 0:
            print("pids", *getattr(loader._pool, "process_ids", []), flush=True)
        if n == {stop}:
            break
    print("end", flush=True)
go()
"""


def script(kind, *, delay=0.02, stop=10**6):
    return [sys.executable, "-c", SCRIPT.format(kind=kind, delay=delay, stop=stop)]


@linux
def test_a_full_dev_shm_does_not_matter():
    """In a mount namespace of its own, with /dev/shm filled to the last byte."""
    fill = "mount -t tmpfs -o size=16k tmpfs /dev/shm && head -c 16384 /dev/zero > /dev/shm/full && "
    trial = subprocess.run(["unshare", "-m", "sh", "-c", fill + "true"], capture_output=True, check=False)
    if trial.returncode:
        pytest.skip("no permission to mount")
    command = fill + 'exec "$@"'
    line = ["unshare", "-m", "sh", "-c", command, "sh", *script("processes", delay=0, stop=20)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.endswith("end\n"), done.stderr


@linux
@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_ends_everything(kind):
    process = subprocess.Popen(
        script(kind), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    pids = [int(word) for word in process.stdout.readline().split()[1:]]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1
    wait_until(lambda: not any(map(running, pids)))


def test_ctrl_c_while_workers_start_comes_afterwards():
    done = []

    def start():
        with workers._interrupts_held(forked=True):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@linux
def test_a_dropped_loader_ends_its_workers_without_waiting():
    """A finaliser may not take its time: a Ctrl-C that arrives in it is lost."""
    loader = make(workers="processes", num_workers=2)
    begun = iter(loader)
    next(begun)
    pids = loader._pool.process_ids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    begun.close()
    wait_until(lambda: not any(map(running, pids)))


@linux
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_at_any_time_ends_everything(kind):
    """From the start of the workers on, at twenty random moments."""
    draw = random.Random(0)
    for _ in range(20):
        process = subprocess.Popen(
            script(kind, delay=0.001), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        time.sleep(draw.uniform(0, 0.1))
        children = own_children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGINT, errors
        assert errors.count("Traceback") == 1, errors
        assert "Exception ignored" not in errors
        wait_until(lambda pids=children: not any(map(running, pids)))


@linux
def test_workers_follow_a_parent_that_was_killed():
    process = subprocess.Popen(script("processes", delay=5), stdout=subprocess.PIPE, text=True)
    time.sleep(0)
    assert process.stdout is not None
    wait_until(lambda: len(own_children(process.pid)) == 2)
    pids = own_children(process.pid)
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until(lambda: not any(map(running, pids)))


def own_children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except FileNotFoundError:
        return []


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("wrong", [{"num_workers": -1}, {"prefetch": 0}, {"workers": "fibres"}])
def test_options_are_checked(wrong):
    with pytest.raises(ValueError, match="Loader: "):
        make(**wrong)
