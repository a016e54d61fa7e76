"""The model store: fetch known models and data sets by name, or any Hugging Face repository. Free of torch.

`fetch("smollm2")` returns a local path, downloaded and checked against a recorded SHA-256 when it is not there yet;
`resolve` also accepts local paths and repo ids.
"""

from __future__ import annotations

import os
from pathlib import Path

from volvelle.errors import UsageError, did_you_mean
from volvelle.hub.assets import ASSETS, Asset
from volvelle.hub.huggingface import REPO_ID, fetch_repo, repositories
from volvelle.hub.store import Stored, fetch, find, home, manifest, status

__all__ = [
    "ASSETS",
    "REPO_ID",
    "Asset",
    "Stored",
    "fetch",
    "fetch_repo",
    "find",
    "home",
    "manifest",
    "repositories",
    "resolve",
    "status",
]


def resolve(path_or_name: str | os.PathLike[str]) -> Path:
    """Return a local path for what the user named: an existing path, a known asset, or a Hugging Face `owner/name`.

    They are tried in this order; assets and repositories are downloaded when absent. Raises UsageError for a name
    that is none of them, with the close ones.

    >>> resolve(".")
    PosixPath('.')
    >>> resolve("smolm2")
    Traceback (most recent call last):
    volvelle.errors.UsageError: 'smolm2' is neither a path here nor a known model
    """
    name = os.fspath(path_or_name)
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    if name in ASSETS:
        return fetch(name)
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or path.suffix in (".gguf", ".safetensors")
    if REPO_ID.fullmatch(name) and not looks_like_path:
        return fetch_repo(name)
    if looks_like_path:
        raise UsageError(f"{name}: no such file or folder", tip=_siblings(path))
    tip = did_you_mean(name, ASSETS) or f"known: {', '.join(ASSETS)}; or a folder, or owner/name on Hugging Face"
    raise UsageError(f"{name!r} is neither a path here nor a known model", tip=tip)


def _siblings(path: Path) -> str | None:
    """Suggest names that do exist beside a path that does not."""
    if not path.parent.is_dir():
        return f"{path.parent} does not exist either"
    return did_you_mean(path.name, [p.name for p in path.parent.iterdir()])
