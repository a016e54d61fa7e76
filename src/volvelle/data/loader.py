"""A loader whose order depends on nothing but (seed, epoch), and which can stop and resume between any two batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol


class Dataset(Protocol):
    """Anything with a length and items by number; `source(i)`, when present, names sample i in messages."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Batch(NamedTuple):
    """What the loader gives: the collated `value`, and the numbers of the samples in it."""

    ids: list[int]
    value: Any


class Loader:
    """Batches of a dataset in a seeded order, with a cursor that can be saved and restored mid-epoch.

    `collate(list of items)` makes the value of a batch. `lengths`, one number a sample, groups samples of similar
    length into a batch (less padding) without touching the rule that the order depends on (seed, epoch) only. Each
    iteration continues at the cursor and ends with the epoch.

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
    ):
        if batch_size < 1:
            raise ValueError(f"Loader: batch_size must be at least 1, got {batch_size}")
        if not len(dataset):
            raise ValueError("Loader: the dataset is empty")
        if drop_last and len(dataset) < batch_size:
            raise ValueError(f"Loader: drop_last leaves no batch: {len(dataset)} samples, batch_size {batch_size}")
        self.dataset, self.batch_size, self.seed, self.collate = dataset, batch_size, seed, collate
        self.shuffle, self.drop_last, self.lengths = shuffle, drop_last, lengths
        self.epoch = 0
        self.position = 0
        """Batches of this epoch already given out."""

    def __len__(self) -> int:
        """Batches in one epoch."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[Batch]:
        plan = self.plan(self.epoch)
        while self.position < len(plan):
            ids = plan[self.position]
            batch = Batch(ids, self.load(ids))
            # The cursor moves before the batch is handed over: a checkpoint taken while the caller works on it
            # counts it as given.
            self.position += 1
            yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def load(self, ids: Sequence[int]) -> Any:
        """Read and collate these samples. Workers will call this; it depends on nothing but its argument."""
        return self.collate([self.dataset[i] for i in ids])

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

    def state_dict(self) -> dict[str, int]:
        """The cursor, and what must be equal for it to mean the same."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "samples": len(self.dataset),
            "batch_size": self.batch_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken. Another seed, dataset size or batch size raises ValueError."""
        ours = self.state_dict()
        for name in ("seed", "samples", "batch_size"):
            if ours[name] != state[name]:
                raise ValueError(f"Loader.load_state_dict: {name} was {state[name]}, this loader has {ours[name]}")
        self.epoch, self.position = state["epoch"], state["position"]
