"""Models of the Hugging Face hub, by repo id `owner/name` (or `owner/name@revision`), in Hugging Face's own cache.

A snapshot counts as complete only once a record of its files is written; from then on it is opened without a network.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from volvelle.errors import VolvelleError
from volvelle.files import sha256, write_atomic
from volvelle.hub.store import home

# Never *.bin or *.pt: pickles run code when they are read.
PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.gguf", "*.jinja")
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def fetch_repo(repo: str, *, refresh: bool = False, pickles: bool = False) -> Path:
    """Return the local folder of a repo's weights, configuration and tokenizer, downloaded when not complete.

    `refresh` asks the hub for a newer version; `pickles` also takes *.bin and *.pt. Raises VolvelleError when the repo
    does not exist, is gated, or the network is away.
    """
    if not refresh and (known := _recorded(repo)) is not None:
        return known
    name, _, revision = repo.partition("@")
    patterns = [*PATTERNS, *(["*.bin", "*.pt"] if pickles else [])]
    folder = _snapshot(name, revision or None, patterns)
    files = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest = sha256(path)
        # The cache names a large file's blob by the SHA-256 that the hub states for it.
        blob = path.resolve().name
        if re.fullmatch(r"[0-9a-f]{64}", blob) and blob != digest:
            path.resolve().unlink()
            raise VolvelleError(f"{repo}: {path.name} arrived damaged and was removed", tip="run the command again")
        files.append({"name": str(path.relative_to(folder)), "size": path.stat().st_size, "sha256": digest})
    if not files:
        raise VolvelleError(
            f"{repo}: the repository holds none of {', '.join(patterns)}",
            tip="pickled weights (.bin, .pt) are taken only on request",
        )
    record = {"name": repo, "source": f"Hugging Face {repo}", "path": str(folder), "files": files}
    write_atomic(_record_path(repo), json.dumps(record, indent=2) + "\n")
    return folder


def repositories() -> list[dict]:
    """Return what is recorded of every repo fetched so far: name, source, path, files with size and sha256."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((home() / "huggingface").glob("*.json"))]


def _record_path(repo: str) -> Path:
    return home() / "huggingface" / (repo.replace("/", "--") + ".json")


def _recorded(repo: str) -> Path | None:
    """Return the snapshot folder when every recorded file is there with its size."""
    try:
        record = json.loads(_record_path(repo).read_text(encoding="utf-8"))
        folder = Path(record["path"])
        complete = all((folder / file["name"]).stat().st_size == file["size"] for file in record["files"])
    except (OSError, ValueError, KeyError):
        return None
    return folder if complete else None


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    """Call snapshot_download and turn its many errors into one sentence and a tip."""
    import huggingface_hub
    from huggingface_hub import errors

    offline_tip = "fetch it on a machine with a network and pass the folder's path, or use volvelle get smollm2"
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        tip = f"accept its terms at https://huggingface.co/{name}, then: hf auth login"
        raise VolvelleError(f"{name}: the repository asks for its terms to be accepted", tip=tip) from error
    except errors.RepositoryNotFoundError as error:
        tip = "check the spelling at https://huggingface.co/models; a private one needs: hf auth login"
        raise VolvelleError(f"{name}: no such path here and no such Hugging Face repository", tip=tip) from error
    except errors.RevisionNotFoundError as error:
        raise VolvelleError(f"{name}: has no revision {revision}") from error
    except errors.HFValidationError as error:
        raise VolvelleError(f"{name!r} is not a Hugging Face repo id: {error}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        message = f"{name}: no such path here, not in the cache, and the Hugging Face hub cannot be reached"
        raise VolvelleError(message, tip=offline_tip) from error
    except errors.HfHubHTTPError as error:
        raise VolvelleError(f"{name}: the Hugging Face hub answered {error}", tip=offline_tip) from error
    except OSError as error:  # the HTTP library's connection errors derive from it
        raise VolvelleError(f"{name}: could not be downloaded ({error})", tip=offline_tip) from error
