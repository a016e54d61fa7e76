"""Files: written so that a crash leaves either the old content or the new, and read with errors that name them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from volvelle.errors import VolvelleError, did_you_mean


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; on success fsync it and rename it over `path`.

    On any exception (a full disk, Ctrl-C) the temporary file is removed and `path` keeps its old content. An existing
    file keeps its permissions; a symbolic link keeps pointing where it points, and what it points to is replaced.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_path(Path(folder) / "a" / "b.txt") as temporary:
    ...         _ = temporary.write_text("whole")
    ...     (Path(folder) / "a" / "b.txt").read_text()
    'whole'
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _new_file_beside(path)
    mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
    try:
        yield temporary
        # Not left to the writer: safetensors puts a file of its own, readable by the owner alone, in this place.
        os.chmod(temporary, mode)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Replace the file's content in one step (see `atomic_path`). Text is written as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def read_json(path: str | os.PathLike[str], *, tip: str | None = None) -> dict[str, Any]:
    """The object in a JSON file. Raises VolvelleError for a missing file and for anything else.

    `tip` says what to do about a missing one; without it, the names close to it in its folder are given.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = tip or did_you_mean(path.name, [other.name for other in path.parent.glob("*.json")])
        raise VolvelleError(f"{path}: no such file", tip=near) from None
    except OSError as error:
        raise VolvelleError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise VolvelleError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise VolvelleError(f"{path}: not a JSON object but a {type(values).__name__}")
    return values


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file as a hex string, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _new_file_beside(path: Path) -> Path:
    # Not tempfile.mkstemp: its files are private (0600), and reading the umask to undo that is not safe with threads.
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        return temporary
