"""Checkpoints: a folder of safetensors and JSON that appears whole or not at all, and is checked before it is trusted.

`checkpoints/step-00000100/` holds `state.json` (counters, cursors, optimiser settings), `tensors.safetensors` (every
tensor the state names) and `manifest.json` (SHA-256 of both). It is written under a temporary name, flushed, and
renamed; nothing is pickled, so opening one runs no code. Of sharded weights every rank writes its part (`sharded.py`).
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from volvelle.errors import VolvelleError
from volvelle.files import sha256, sync

Tree = Any
_STEP = re.compile(r"step-(\d{8,})")


class CorruptCheckpoint(VolvelleError):
    """A checkpoint whose files are missing, truncated, or not the bytes that were written."""


def pack(tree: Tree, tensors: dict[str, Tensor], path: str = "", *, shards: dict[str, Tensor] | None = None) -> Tree:
    """Turn nested dicts, lists, tuples and tensors into plain JSON data, moving the tensors into `tensors`.

    Dict keys that are not text (optimiser states are numbered) and tuples survive the round trip through `unpack`.
    Sharded tensors (DTensor) are moved into `shards` as they are. Anything else raises TypeError.

    >>> tensors = {}
    >>> pack({"step": 3, 0: (1, torch.ones(2))}, tensors, "state")
    {'$dict': [['step', 3], [0, {'$tuple': [1, {'$tensor': 'state/0/1'}]}]]}
    >>> list(tensors)
    ['state/0/1']
    """
    if isinstance(tree, Tensor):
        if hasattr(tree, "full_tensor"):
            if shards is None:
                raise TypeError(f"pack: a sharded tensor at {path}")
            shards[path] = tree.detach()
            return {"$shard": path}
        if path in tensors:
            raise ValueError(f"pack: two tensors at {path}")
        # A copy of its own: safetensors refuses tensors that share memory.
        tensors[path] = tree.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": path}
    if isinstance(tree, Mapping):
        items = [(key, pack(value, tensors, f"{path}/{key}", shards=shards)) for key, value in tree.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {"$dict": [[key, value] for key, value in items]}
    if isinstance(tree, list | tuple):
        items = [pack(value, tensors, f"{path}/{i}", shards=shards) for i, value in enumerate(tree)]
        return {"$tuple": items} if isinstance(tree, tuple) else items
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"pack: cannot store {type(tree).__name__} at {path or 'the root'}")


def unpack(tree: Tree, tensors: Mapping[str, Tensor], shards: Mapping[str, Tensor] = MappingProxyType({})) -> Tree:
    """Undo `pack`."""
    if isinstance(tree, list):
        return [unpack(value, tensors, shards) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        # A copy: memory mapped from the file need not have the alignment of a fresh allocation, on which the choice
        # of kernel, and so the last bit, may depend.
        return tensors[tree["$tensor"]].clone()
    if "$shard" in tree:
        return shards[tree["$shard"]]
    if "$tuple" in tree:
        return tuple(unpack(value, tensors, shards) for value in tree["$tuple"])
    if "$dict" in tree:
        return {key: unpack(value, tensors, shards) for key, value in tree["$dict"]}
    return {key: unpack(value, tensors, shards) for key, value in tree.items()}


class Checkpoints:
    """The checkpoints of one run: save, prune, and find the newest sound one."""

    def __init__(self, folder: Path, *, keep_last: int = 2):
        self.folder, self.keep_last = folder, keep_last

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m[1]) for p in self.folder.iterdir() if p.is_dir() and (m := _STEP.fullmatch(p.name)))

    def path(self, step: int) -> Path:
        """The folder of one step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: Tree, *, best: int | None = None) -> Path:
        """Write the state under `step`, then drop checkpoints beyond the newest `keep_last` and the step `best`.

        Those of later steps are dropped too: this one was written after a corrupt one of theirs was passed over, and
        they belong to a future that will not come. A failure (a full disk) leaves earlier checkpoints as they were and
        raises VolvelleError.
        """
        temporary = self._temporary(step)
        try:
            self._sweep()
            temporary.mkdir(parents=True)
            tensors: dict[str, Tensor] = {}
            write(temporary, pack(state, tensors), tensors)
            self._publish(step)
        except (OSError, SafetensorError) as error:
            raise self._failed(step, error) from error
        self._prune(step, best)
        return self.path(step)

    def load(self, step: int) -> Tree:
        """The state saved at `step`. A file that is not what was written raises CorruptCheckpoint."""
        folder = self.path(step)
        try:
            self.verify(step)
            state, tensors = read(folder)
        except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
            raise CorruptCheckpoint(f"{folder}: not a whole checkpoint ({error})") from error
        return unpack(state, tensors)

    def verify(self, step: int) -> None:
        """Compare every file with the manifest; a difference raises CorruptCheckpoint."""
        folder = self.path(step)
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            for name, digest in manifest["sha256"].items():
                if sha256(folder / name) != digest:
                    raise CorruptCheckpoint(f"{folder / name}: its SHA-256 differs from the manifest's")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CorruptCheckpoint(f"{folder}: not a whole checkpoint ({error})") from error

    def newest(self, say: Callable[[str], None]) -> tuple[int, Tree] | None:
        """The newest sound checkpoint as (step, state), or None when there is none.

        Each corrupt one on the way is named through `say`. When all are corrupt, raises VolvelleError: starting over
        in silence would throw away a run.
        """
        self._recover()
        steps = self.steps()
        for step in reversed(steps):
            try:
                return step, self.load(step)
            except CorruptCheckpoint as error:
                say(f"checkpoint of step {step} is corrupt and was passed over: {error}")
        if steps:
            raise VolvelleError(
                f"{self.folder}: all {len(steps)} checkpoints are corrupt",
                tip="start again under another name, or delete the folder to start over",
            )
        return None

    def _temporary(self, step: int) -> Path:
        return self.folder / f".{self.path(step).name}.part"

    def _replaced(self, step: int) -> Path:
        return self.folder / f".{self.path(step).name}.old"

    def _recover(self) -> None:
        """Give a checkpoint its name back that was to be replaced when the process was killed between two renames."""
        for old in self.folder.glob(".step-*.old"):
            target = old.with_name(old.stem[1:])
            if not target.exists():
                old.rename(target)

    def _publish(self, step: int) -> None:
        """Seal the temporary folder and give it its name."""
        target, temporary = self.path(step), self._temporary(step)
        seal(temporary)
        if target.exists():
            # A step that is reached, or measured, again: rename cannot replace a folder that has files.
            target.rename(self._replaced(step))
        temporary.rename(target)
        sync(self.folder)
        self._sweep()

    def _failed(self, step: int, error: Exception) -> VolvelleError:
        """Clear away a save that failed, and say what is left."""
        shutil.rmtree(self._temporary(step), ignore_errors=True)
        self._recover()
        return _save_error(self.path(step), error, self.steps())

    def _sweep(self) -> None:
        """Remove what a killed save left behind."""
        self._recover()
        for leftover in (*self.folder.glob(".step-*.part"), *self.folder.glob(".step-*.old")):
            shutil.rmtree(leftover)

    def _prune(self, newest: int, best: int | None) -> None:
        steps = self.steps()
        kept = [step for step in steps if step <= newest][-self.keep_last :]
        for step in steps:
            if step not in kept and step != best:
                shutil.rmtree(self.path(step))


def write(folder: Path, tree: Tree, tensors: Mapping[str, Tensor]) -> None:
    """Write packed data and its tensors."""
    save_file(dict(tensors), folder / "tensors.safetensors")
    (folder / "state.json").write_text(json.dumps(tree))


def read(folder: Path) -> tuple[Tree, dict[str, Tensor]]:
    """What `write` wrote."""
    return json.loads((folder / "state.json").read_text()), load_file(folder / "tensors.safetensors")


def seal(folder: Path) -> None:
    """Write the manifest over all files of the folder, and flush everything to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"format": 1, "torch": torch.__version__, "sha256": digests}))
    folders = {path.parent for path in files} | {folder}
    for path in (*files, manifest, *sorted(folders, reverse=True)):
        sync(path)


def _save_error(target: Path, error: Exception, steps: list[int]) -> VolvelleError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error) or "os error 28" in str(error)
    reason = "the disk is full" if full else str(error)
    kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "no earlier checkpoint exists"
    tip = "free some space, then resume the run" if full else None
    return VolvelleError(f"{target}: could not save the checkpoint: {reason}; {kept}", tip=tip)
