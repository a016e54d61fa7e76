"""The model store: a folder in the user's cache with one subfolder an asset and a manifest of what was verified.

HOME/assets/NAME/            the files, and manifest.json, written last: without it nothing is loaded
HOME/downloads/              archives on their way; a .part file is continued by the next try
HOME/locks/NAME.lock         held while an asset is fetched, freed by the kernel when the process dies
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from volvelle.errors import UsageError, VolvelleError, did_you_mean
from volvelle.files import sha256, write_atomic
from volvelle.hub import idx
from volvelle.hub.assets import ASSETS, FASHION_MNIST, Asset
from volvelle.hub.progress import Lines, Report, megabytes


def home() -> Path:
    """Return the folder of the store: VOLVELLE_HOME, else `volvelle` in the user's cache folder."""
    if chosen := os.environ.get("VOLVELLE_HOME"):
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("volvelle", appauthor=False))


@dataclass(frozen=True)
class Stored:
    """State of one asset on this machine; `note` says what is wrong when `state` is "damaged"."""

    asset: Asset
    path: Path
    state: Literal["ready", "absent", "damaged"]
    note: str = ""


def find(name: str) -> Asset:
    """Return the asset of that name; an unknown one is a UsageError with the close names."""
    if name not in ASSETS:
        raise UsageError(
            f"{name!r} is not a model or data set that Volvelle knows",
            tip=did_you_mean(name, ASSETS) or f"known: {', '.join(ASSETS)}; or a Hugging Face repo id, owner/name",
        )
    return ASSETS[name]


def status(name: str, *, verify: bool = False) -> Stored:
    """Look at an asset without fetching it: the sizes always, the SHA-256 of each file with `verify=True`."""
    asset = find(name)
    if asset is FASHION_MNIST and (folder := os.environ.get("VOLVELLE_FASHION_MNIST")):
        idx.check_folder(Path(folder).expanduser())
        return Stored(asset, Path(folder).expanduser(), "ready", "from VOLVELLE_FASHION_MNIST")
    folder = _folder(asset)
    path = folder / asset.members[0].name if len(asset.members) == 1 else folder
    try:
        recorded = _expected(asset, json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Stored(asset, path, "absent")
    except (ValueError, KeyError, TypeError):
        return Stored(asset, path, "damaged", f"{folder / 'manifest.json'} is not readable")
    for file, (size, digest) in recorded.items():
        here = folder / file
        if not here.is_file():
            return Stored(asset, path, "damaged", f"{here} is missing")
        if here.stat().st_size != size:
            return Stored(asset, path, "damaged", f"{here} has {here.stat().st_size} bytes, expected {size}")
        if verify and (got := sha256(here)) != digest:
            return Stored(asset, path, "damaged", f"{here} has SHA-256 {got}, expected {digest}")
    return Stored(asset, path, "ready")


def fetch(
    name: str, *, source: str | os.PathLike[str] | None = None, verify: bool = False, report: Report | None = None
) -> Path:
    """Return the asset's file (or folder, when it has several), downloaded and checked first when it is not there.

    `source`: take it from this local archive, file or folder instead of the network. `verify=True` also re-computes
    the SHA-256 of what is stored. Progress goes to `report` (default: plain lines on stderr).
    Raises UsageError for an unknown name and VolvelleError when it cannot be fetched whole.

    >>> fetch("smollm")
    Traceback (most recent call last):
    volvelle.errors.UsageError: 'smollm' is not a model or data set that Volvelle knows
    """
    asset = find(name)
    if source is None and (now := status(name, verify=verify)).state == "ready":
        return now.path
    with _locked(asset), _disk_errors(asset):
        # Another process may have fetched it while this one waited for the lock.
        if source is None and (now := status(name, verify=verify)).state == "ready":
            return now.path
        folder = _folder(asset)
        (folder / "manifest.json").unlink(missing_ok=True)
        for orphan in folder.glob(".*.part"):  # temporary files of a process that was killed while it held the lock
            orphan.unlink()
        origin = _install(asset, folder, source, report or Lines())
        _write_manifest(asset, folder, origin)
    return status(name).path


def _expected(asset: Asset, record: dict) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 by file name: the built-in ones, or the manifest's for a folder the user brought."""
    files = {entry["name"]: (entry["size"], entry["sha256"]) for entry in record["files"]}
    if str(record["source"]).startswith("folder "):
        if len(files) < len(asset.members):
            raise ValueError("manifest lists too few files")
        return files
    return {member.name: (member.size, member.sha256) for member in asset.members}


def _install(asset: Asset, folder: Path, source: str | os.PathLike[str] | None, report: Report) -> str:
    """Put the asset's files into `folder` and return where they came from."""
    # Imported late: the HTTP client and the archive readers take a while to load, and most calls find the file there.
    from volvelle.hub import sources

    if source is None:
        downloads = home() / "downloads"
        _need_space(asset)
        archive = sources.obtain(asset.source, downloads, report)
        sources.extract(archive, asset.source, asset.members, folder)
        if archive.parent == downloads:
            archive.unlink()
        return str(asset.source)
    path = Path(source).expanduser()
    if not path.exists():
        raise VolvelleError(f"from={path}: no such file or folder")
    if path.is_dir():
        if asset is not FASHION_MNIST:
            raise UsageError(f"{asset.name} comes from one file, {path} is a folder", tip=f"from={asset.source.file}")
        idx.copy_folder(path, folder)
        return f"folder {path.resolve()}"
    if len(asset.members) == 1 and path.stat().st_size == asset.members[0].size:
        with open(path, "rb") as stream:
            sources.store(stream, asset.members[0], folder / asset.members[0].name)
        return f"file {path.resolve()}"
    sources.check_archive(path, asset.source)
    sources.extract(path, asset.source, asset.members, folder)
    return f"file {path.resolve()}"


def _write_manifest(asset: Asset, folder: Path, origin: str) -> None:
    """Record every file of the folder; the hash is read back from the disk."""
    files = [
        {"name": path.name, "size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.name != "manifest.json"
    ]
    record = {"name": asset.name, "what": asset.what, "licence": asset.licence, "source": origin, "files": files}
    write_atomic(folder / "manifest.json", json.dumps(record, indent=2) + "\n")


def manifest(name: str) -> dict:
    """Return what was recorded when the asset was stored: source, licence, and the SHA-256 of each file."""
    asset = find(name)
    path = _folder(asset) / "manifest.json"
    if not path.is_file():
        return {"name": name, "what": asset.what, "licence": asset.licence, "source": "", "files": []}
    return json.loads(path.read_text(encoding="utf-8"))


def _folder(asset: Asset) -> Path:
    return home() / "assets" / asset.name


@contextlib.contextmanager
def _locked(asset: Asset) -> Iterator[None]:
    import filelock

    path = home() / "locks" / f"{asset.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        tip = "set VOLVELLE_HOME to a folder you may write to"
        raise VolvelleError(f"cannot write to the model store {home()}: {error.strerror}", tip=tip) from error
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"another process is fetching {asset.name}; waiting for it", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _disk_errors(asset: Asset) -> Iterator[None]:
    """Turn a full or read-only disk into an error the user can act on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise VolvelleError(
            f"cannot store {asset.name} in {home()}: {error.strerror}",
            tip="free some space, or set VOLVELLE_HOME to another folder",
        ) from error


def _need_space(asset: Asset) -> None:
    """Refuse before downloading when the disk cannot hold the archive and what is taken out of it."""
    home().mkdir(parents=True, exist_ok=True)
    archive = home() / "downloads" / asset.source.file
    begun = sum(path.stat().st_size for path in (archive, archive.with_name(f"{archive.name}.part")) if path.exists())
    need, free = asset.source.size + asset.size - begun, shutil.disk_usage(home()).free
    if free < need:
        raise VolvelleError(
            f"{asset.name} needs {megabytes(need)} more in {home()}, {megabytes(free)} are free",
            tip="free some space, or set VOLVELLE_HOME to another folder",
        )
