"""`volvelle get`: fetch a model or data set, check it, and say where it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from volvelle.cli.console import DownloadReport, result, say, table
from volvelle.errors import UsageError, did_you_mean
from volvelle.hub.progress import megabytes

EXAMPLES = ("volvelle get smollm2", "volvelle get countries verify=true --json")


@dataclass(frozen=True)
class Options:
    """What to fetch."""

    model: Positional[str]
    """A name from `volvelle ls models`, or a Hugging Face repo id: owner/name, owner/name@revision."""
    from_: Path | None = None
    """Take it from this local archive, file or folder instead of the network."""
    verify: bool = False
    """Compute the SHA-256 of what is already stored once more; fetch it again when it is wrong."""
    pickles: bool = False
    """Also take .bin and .pt files from Hugging Face: pickles, which can run code when they are read."""


def main(options: Options) -> int:
    """Fetch, then print path, size, licence and SHA-256."""
    try:
        return _get(options)
    except KeyboardInterrupt:
        say(f"stopped; continue with: volvelle get {options.model}")
        raise


def _get(options: Options) -> int:
    from volvelle import hub

    with DownloadReport() as report:
        if options.model in hub.ASSETS:
            path = hub.fetch(options.model, source=options.from_, verify=options.verify, report=report)
            record = hub.manifest(options.model)
        elif hub.REPO_ID.fullmatch(options.model):
            if options.from_ is not None:
                raise UsageError("from= works for the names of `volvelle ls models`", tip="a folder needs no get")
            path = hub.fetch_repo(options.model, refresh=True, pickles=options.pickles)
            record = next(known for known in hub.repositories() if known["name"] == options.model)
        else:
            tip = did_you_mean(options.model, hub.ASSETS) or "volvelle ls models; or owner/name on Hugging Face"
            raise UsageError(f"get: unknown model {options.model!r}", tip=tip)
    licence = record.get("licence", f"see https://huggingface.co/{options.model}")
    files = record["files"]
    size = sum(file["size"] for file in files)
    say(
        f"{options.model}: {record.get('what', 'Hugging Face repository')}",
        f"path     {path}",
        f"size     {megabytes(size)}",
        f"licence  {licence}",
        f"source   {record['source']}",
    )
    if len(files) == 1:
        say(f"sha256   {files[0]['sha256']}")
    elif files:
        say()
        table(("file", "bytes", "sha256"), [(file["name"], file["size"], file["sha256"]) for file in files])
    facts = {"model": options.model, "path": path, "bytes": size, "licence": licence}
    result({**facts, "source": record["source"], "files": files})
    return 0
