"""What `fit` asks of the loader and the run folder it is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from volvelle.data.loader import Batch


class Batches(Protocol):
    """Batches with a cursor; `volvelle.data.loader.Loader` is one."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def describe(self, ids: Sequence[int], /) -> str:
        """Name these samples in a message."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The cursor."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Continue at the cursor."""
        ...


class Run(Protocol):
    """A folder and its metrics; `volvelle.runs.RunFolder` is one."""

    @property
    def path(self) -> Path:
        """The folder."""
        ...

    def log(self, record: dict[str, Any], /) -> None:
        """Append a line to metrics.jsonl."""
        ...

    def metrics(self) -> list[dict[str, Any]]:
        """The lines so far."""
        ...
