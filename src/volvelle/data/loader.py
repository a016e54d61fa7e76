"""A loader whose order depends on nothing but (seed, epoch), and which can stop and resume between any two batches."""

from __future__ import annotations

import contextlib
import hashlib
import random
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from volvelle.data.transport import told
from volvelle.data.worker_process import Task
from volvelle.data.workers import Kind, Pool, ProcessPool, ThreadPool, ahead
from volvelle.errors import VolvelleError


class Dataset(Protocol):
    """Anything with a length and items by number.

    Two methods are used when present: `source(i)` names sample i in messages, and `draw(i, generator)` is asked for the
    item instead of `dataset[i]`, with a `random.Random` that depends on (seed, epoch, i) only. Augmentation that takes
    its random numbers from there is the same for any number of workers and after any resume.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Batch(NamedTuple):
    """What the loader gives: the collated `value`, and the numbers of the samples in it."""

    ids: list[int]
    value: Any


class Reader:
    """Reads and collates the samples of one batch; the result depends on nothing but the arguments."""

    def __init__(self, dataset: Dataset, collate: Callable[[list[Any]], Any]):
        self.dataset, self.collate = dataset, collate

    def __call__(self, task: Task, begin: Callable[[int], None]) -> Any:
        """Read the samples of `task`; an error names the sample. `begin(i)` is called before sample i is read."""
        items, draw = [], getattr(self.dataset, "draw", None)
        for i in task.ids:
            begin(i)
            try:
                items.append(draw(i, random.Random(f"{task.key}/{i}")) if draw else self.dataset[i])
            except VolvelleError:
                raise  # says already which file it is about
            except Exception as error:
                message = f"cannot read {self.describe([i])}: {told(error)}"
                raise VolvelleError(message) from error
        return self.collate(items)

    def describe(self, ids: Sequence[int]) -> str:
        """Where these samples come from."""
        source = getattr(self.dataset, "source", None)
        return ", ".join(source(i) if source else f"sample {i}" for i in ids)


class Loader:
    """Batches of a dataset in a seeded order, with a cursor that can be saved and restored mid-epoch.

    `collate(list of items)` makes the value of a batch. `lengths`, one number a sample, groups samples of similar
    length into a batch (less padding) without touching the rule that the order depends on (seed, epoch) only. Each
    iteration continues at the cursor and ends with the epoch.

    With `num_workers` threads or processes batches are read ahead, at most `prefetch` a worker; order, content and
    cursor stay the same. Workers live until `close()`, or until the loader is gone; leaving an epoch early ends them
    too. docs/data.md says when which kind wins.

    >>> loader = Loader(range(5), 2, seed=0, collate=list, shuffle=False)
    >>> [batch.value for batch in loader]
    [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int,
        collate: Callable[[list[Any]], Any],
        shuffle: bool = True,
        drop_last: bool = False,
        lengths: Sequence[int] | None = None,
        workers: Kind = "threads",
        num_workers: int = 0,
        prefetch: int = 2,
    ):
        if batch_size < 1:
            raise ValueError(f"Loader: batch_size must be at least 1, got {batch_size}")
        if not len(dataset):
            raise ValueError("Loader: the dataset is empty")
        if drop_last and len(dataset) < batch_size:
            raise ValueError(f"Loader: drop_last leaves no batch: {len(dataset)} samples, batch_size {batch_size}")
        if num_workers < 0 or prefetch < 1:
            raise ValueError(f"Loader: needs num_workers >= 0 and prefetch >= 1, got {num_workers} and {prefetch}")
        if workers not in {"threads", "processes"}:
            raise ValueError(f"Loader: workers must be threads or processes, got {workers!r}")
        self.dataset, self.batch_size, self.seed, self.collate = dataset, batch_size, seed, collate
        self.workers: Kind = workers
        self.num_workers, self.prefetch = num_workers, prefetch
        self._reader = Reader(dataset, collate)
        self._pool: Pool | None = None
        self._end: weakref.finalize | None = None
        self.shuffle, self.drop_last, self.lengths = shuffle, drop_last, lengths
        self.rank, self.world = 0, 1
        self.epoch = 0
        self.position = 0
        """Batches of this epoch already given out, to all ranks together."""

    def __len__(self) -> int:
        """Batches in one epoch."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def split(self, rank: int, world: int) -> Loader:
        """Give out every `world`-th batch only, from number `rank` on; returns the loader itself.

        The batches go round: of each `world` in a row, rank r takes the r-th. A round may cross the end of an epoch, so
        nothing is left out or repeated, and all ranks have the same cursor after each round.

        >>> [b.value for b in Loader(range(6), 2, seed=0, collate=list, shuffle=False).split(1, 2)]
        [[2, 3], [0, 1]]
        """
        if not 0 <= rank < world:
            raise ValueError(f"Loader.split: rank must lie in 0 … {world - 1}, got {rank}")
        self.rank, self.world = rank, world
        return self

    def __iter__(self) -> Iterator[Batch]:
        tasks = list(self._tasks())
        with contextlib.closing(self._values(tasks)) as values:
            for (_, ids), value in zip(tasks, values, strict=True):
                # The cursor moves before the batch is handed over: a checkpoint taken while the caller works on it
                # counts it as given. What workers have read ahead is not counted.
                self.position += self.world
                yield Batch(ids, value)
        # The last round may have reached into the next epoch.
        self.epoch, self.position = self.epoch + 1, self.position - len(self)

    def _tasks(self) -> Iterator[tuple[str, list[int]]]:
        """(key of the epoch, sample numbers) of this rank's batch in every round that begins in this epoch."""
        count, plans = len(self), {self.epoch: self.plan(self.epoch)}
        for start in range(self.position, count, self.world):
            later, at = divmod(start + self.rank, count)
            epoch = self.epoch + later
            if epoch not in plans:
                plans[epoch] = self.plan(epoch)
            yield f"{self.seed}/{epoch}", plans[epoch][at]

    def _values(self, tasks: list[tuple[str, list[int]]]) -> Generator[Any, None, None]:
        """The value of every task, read here or ahead of time by workers."""
        if not self.num_workers:
            for key, ids in tasks:
                yield self._reader(Task(0, key, ids), lambda _: None)
            return
        pool = self._pool = self._pool or self._start()
        finished = False
        try:
            yield from ahead(pool, iter(tasks), self.num_workers * self.prefetch)
            finished = True
        except GeneratorExit:  # left early by the caller, perhaps in a finaliser, where a Ctrl-C would be lost
            finished = True
            pool.abandon()
            self._pool = None
            raise
        finally:
            if not finished:  # by an error: nobody will take what is being read
                self.close()

    def _start(self) -> Pool:
        if self.workers == "threads":
            pool = ThreadPool(self._reader, self.num_workers)
        else:
            pool = ProcessPool(self._reader, self.num_workers, self._reader.describe)
        self._end = weakref.finalize(self, pool.abandon)
        return pool

    def close(self) -> None:
        """End the workers; the next iteration starts new ones."""
        pool, self._pool = self._pool, None
        if self._end:
            self._end.detach()
        if pool:
            pool.close()

    def load(self, ids: Sequence[int]) -> Any:
        """Read and collate these samples here, as this epoch has them."""
        return self._reader(Task(0, self._key(), ids), lambda _: None)

    def _key(self) -> str:
        return f"{self.seed}/{self.epoch}"

    def plan(self, epoch: int) -> list[list[int]]:
        """The sample numbers of every batch of an epoch, in order."""
        order = list(range(len(self.dataset)))
        draw = random.Random(f"{self.seed}/{epoch}")
        if self.shuffle:
            draw.shuffle(order)
        if self.lengths is not None:
            order = self._group(order)
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self.drop_last and len(batches[-1]) < self.batch_size:
            batches.pop()
        if self.shuffle and self.lengths is not None:
            draw.shuffle(batches)
        return batches

    def _group(self, order: list[int]) -> list[int]:
        """Sort by length inside windows of 32 batches: enough to cut the padding, too little to order the epoch."""
        assert self.lengths is not None
        window, lengths = 32 * self.batch_size, self.lengths
        parts = [order[i : i + window] for i in range(0, len(order), window)]
        return [i for part in parts for i in sorted(part, key=lambda i: lengths[i])]

    def describe(self, ids: Sequence[int]) -> str:
        """Where these samples come from, for messages: `train.jsonl:17, train.jsonl:4`."""
        source = getattr(self.dataset, "source", str)
        return ", ".join(source(i) for i in ids)

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and what must be equal for it to mean the same."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "samples": len(self.dataset),
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "lengths": _digest(self.lengths),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. ValueError where other batches would follow (another seed or order)."""
        ours = self.state_dict()
        for name in ours:
            if name not in ("epoch", "position") and name in state and ours[name] != state[name]:
                raise ValueError(f"Loader.load_state_dict: {name} was {state[name]}, this loader has {ours[name]}")
        self.epoch, self.position = state["epoch"], state["position"]


def _digest(lengths: Sequence[int] | None) -> str | None:
    return None if lengths is None else hashlib.sha256(",".join(map(str, lengths)).encode()).hexdigest()
