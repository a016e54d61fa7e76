"""The run folder: everything one run of a verb leaves behind, in one place that the other verbs accept.

runs/adapt-smollm2-lora-1/
    manifest.json     kind, status, base model, dates, Volvelle's version
    config.yaml       the options, accepted back with config=
    env.json          Python, torch, platform: what the run ran on
    metrics.jsonl     one JSON object a line
    report.html       written by the verb
    weights/ adapter/ checkpoints/
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from volvelle import __version__
from volvelle.errors import UsageError, VolvelleError, did_you_mean
from volvelle.files import write_atomic
from volvelle.processes import birth

STATUSES = ("running", "finished", "interrupted", "failed")
PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "transformers", "peft")


class RunFolder:
    """One run on disk: `path`, and `manifest` as last read or written (change it with `update_manifest`)."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        self._tail_checked = False

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r}, kind={self.manifest.get('kind')!r}, status={self.status!r})"

    @classmethod
    def create(
        cls,
        name: str | None = None,
        *,
        root: str | os.PathLike[str] = "runs",
        kind: str,
        config: Mapping[str, Any],
        replace: bool = False,
    ) -> RunFolder:
        """Make a new run folder under `root` with status "running".

        Without a name it is called after the kind and the config's `model` and `method` and numbered from 1:
        `adapt-smollm2-lora-1`. A given name must be free, unless `replace` is True: then the run of that name is
        deleted first. Two processes never get the same folder. Raises VolvelleError when the name is taken.
        """
        base = Path(root)
        base.mkdir(parents=True, exist_ok=True)
        path = _numbered(base, _stem(kind, config)) if name is None else _named(base, name, replace)
        for sub in ("weights", "adapter", "checkpoints"):
            (path / sub).mkdir()
        write_atomic(path / "env.json", json.dumps(environment(), indent=2) + "\n")
        write_config(path / "config.yaml", config)
        model = _base_model(config)
        run = cls(path, {})
        run.update_manifest(
            name=path.name,
            kind=kind,
            status="running",
            base_model=model,
            created=_now(),
            volvelle=__version__,
            pid=os.getpid(),
        )
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Open an existing run. Raises UsageError when `path` is not a run folder, with the close names beside it."""
        path = Path(path)
        if not path.is_dir():
            beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UsageError(f"{path}: no such run folder", tip=did_you_mean(path.name, beside) or "volvelle ls runs")
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"{path}: not a run folder (it has no manifest.json)", tip="volvelle ls runs") from None
        except ValueError as error:
            raise VolvelleError(f"{path / 'manifest.json'}: not readable as JSON ({error})") from error
        if not isinstance(manifest, dict) or "kind" not in manifest:
            raise UsageError(f"{path}: not a run folder (its manifest.json names no kind)", tip="volvelle ls runs")
        return cls(path, manifest)

    @property
    def status(self) -> str:
        """The manifest's status; "interrupted" when it says running but its process is gone (killed, power cut)."""
        status = str(self.manifest.get("status", "failed"))
        return "interrupted" if status == "running" and self._is_dead() else status

    def update_manifest(self, **fields: Any) -> None:
        """Add or change manifest fields in one step on disk (`status` must be one of STATUSES).

        Beside a `pid` go this machine's name and when the process started, which name it for good.
        """
        if "pid" in fields:
            fields = {"host": socket.gethostname(), "born": birth(fields["pid"])} | fields
        status = fields.get("status", "running")
        if status not in STATUSES:
            raise ValueError(f"update_manifest: status must be one of {', '.join(STATUSES)}, got {status!r}")
        if status != "running":
            fields.setdefault("ended", _now())
        merged = {**self.manifest, **plain(fields)}
        write_atomic(self.path / "manifest.json", json.dumps(merged, indent=2, allow_nan=False) + "\n")
        self.manifest = merged

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and flush it.

        Zero-dimensional tensors and numpy scalars become numbers. JSON has no NaN or infinity: they are written as
        the strings "NaN", "Infinity" and "-Infinity", and `metrics` reads them back as floats.
        """
        path = self.path / "metrics.jsonl"
        line = json.dumps(plain(record), allow_nan=False) + "\n"
        if not self._tail_checked:
            _cut_torn_line(path)
            self._tail_checked = True
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)

    def metrics(self) -> list[dict[str, Any]]:
        """Return what was logged. A last line cut short by a crash is left out; a broken one elsewhere is an error."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_bytes().split(b"\n")
        records = []
        for number, line in enumerate(lines[:-1], 1):  # after the last newline comes nothing, or a torn line
            try:
                records.append({key: _FLOATS.get(value, value) if isinstance(value, str) else value
                                for key, value in json.loads(line).items()})  # fmt: skip
            except (ValueError, AttributeError) as error:
                raise VolvelleError(f"{path}:{number}: not a JSON object") from error
        return records

    def config(self) -> dict[str, Any]:
        """Return the options stored in config.yaml."""
        import yaml

        path = self.path / "config.yaml"
        try:
            return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise VolvelleError(f"{path}: missing") from None
        except yaml.YAMLError as error:
            raise VolvelleError(f"{path}: not readable as YAML ({error})") from error

    def _is_dead(self) -> bool:
        pid = self.manifest.get("pid")
        if not isinstance(pid, int) or self.manifest.get("host") != socket.gethostname():
            return False
        born = self.manifest.get("born")
        if born and birth(pid) != born:  # gone, or its number is another process's by now
            return True
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


def scan(root: str | os.PathLike[str] = "runs") -> list[RunFolder]:
    """Return the runs under `root`, oldest first; folders that are not runs are passed over."""
    runs = []
    for manifest in Path(root).glob("*/manifest.json"):
        try:
            runs.append(RunFolder.open(manifest.parent))
        except VolvelleError:
            continue
    return sorted(runs, key=lambda run: (str(run.manifest.get("created", "")), run.path.name))


def environment() -> dict[str, Any]:
    """Return what a run ran on: Python, platform, package versions, threads. Does not import torch."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "volvelle": __version__,
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "cpus_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "command": sys.argv,
        "created": _now(),
    }


def write_config(path: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Write options as YAML, in one step."""
    import yaml

    write_atomic(path, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))


def plain(value: Any) -> Any:
    """Turn a value into what JSON and YAML know: dataclasses and mappings to dict, sequences to list, paths to str.

    >>> plain({"data": Path("a.txt"), "targets": ("q", "v"), "loss": float("nan")})
    {'data': 'a.txt', 'targets': ['q', 'v'], 'loss': 'NaN'}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if getattr(value, "ndim", None) == 0:  # a 0-d tensor or a numpy scalar
        value = value.item()  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _base_model(config: Mapping[str, Any]) -> str | None:
    """Return the model that the run starts from; training from scratch has a model's shape there instead."""
    model = config.get("model")
    return str(model) if isinstance(model, str | os.PathLike) else None


def _stem(kind: str, config: Mapping[str, Any]) -> str:
    words = [kind]
    if model := _base_model(config):
        words.append(Path(model.partition("@")[0].rstrip("/")).name.removesuffix(".gguf"))
    if isinstance(method := config.get("method"), str):
        words.append(method)
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(words).lower()).strip("-.")


def _numbered(base: Path, stem: str) -> Path:
    """Claim the first free number: mkdir either makes the folder or fails, also between two processes."""
    number = 1
    while True:
        path = base / f"{stem}-{number}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _named(base: Path, name: str, replace: bool) -> Path:
    path = base / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise UsageError(f"name={name}: a run's name is one folder name", tip="choose the folder above it with root=")
    if replace and (path / "manifest.json").is_file():
        shutil.rmtree(path)
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir() or any(path.iterdir()):
            tip = "choose another name=, or leave it out for a numbered one"
            raise VolvelleError(f"{path}: already exists", tip=tip) from None
    return path


def _cut_torn_line(path: Path) -> None:
    """Drop what follows the last newline, which a crash left half written, before more is appended."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
