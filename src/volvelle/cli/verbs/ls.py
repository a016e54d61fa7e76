"""`volvelle ls`: what there is to use, and what is on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from volvelle.cli import catalogue
from volvelle.cli.console import result, say, table
from volvelle.cli.table import available
from volvelle.hub.progress import megabytes

EXAMPLES = ("volvelle ls", "volvelle ls models")
SECTIONS = ("techniques", "recipes", "claims", "models", "runs")


@dataclass(frozen=True)
class Options:
    """What to list."""

    what: Positional[Literal["techniques", "recipes", "claims", "models", "runs"] | None] = None
    """One list; all of them when left out."""
    runs: Path = Path("runs")
    """Folder of the runs."""


def main(options: Options) -> int:
    """Print the lists."""
    record: dict[str, Any] = {}
    for section in SECTIONS if options.what is None else (options.what,):
        if section == "runs":
            record[section] = _runs(options.runs)
        else:
            record[section] = {
                "techniques": _techniques,
                "recipes": _recipes,
                "claims": _claims,
                "models": _models,
            }[section]()
        if options.what is None and section != SECTIONS[-1]:
            say()
    result(record)
    return 0


def _techniques() -> list[dict[str, Any]]:
    found = catalogue.techniques()
    rows = [(item.family, ", ".join(name.partition(".")[2] for name in item.names), item.title) for item in found]
    table(("family", "names in volvelle.functional and volvelle.nn", "technique"), rows)
    return [vars(item) | {"names": list(item.names)} for item in found]


def _recipes() -> list[dict[str, Any]]:
    found = [verb for verb in available() if verb.group == "train and adapt"]
    if found:
        table(("recipe", "what it does"), [(f"volvelle {verb.name}", verb.help) for verb in found])
    else:
        say("no recipes yet")
    return [{"name": verb.name, "help": verb.help} for verb in found]


def _claims() -> list[dict[str, Any]]:
    found = catalogue.claims()
    if found:
        table(("claim", "what is measured"), [(item.name, item.title) for item in found])
    else:
        say("no claims yet")
    return [vars(item) for item in found]


def _models() -> list[dict[str, Any]]:
    from volvelle import hub

    found = []
    for name, asset in hub.ASSETS.items():
        stored = hub.status(name)
        found.append({
            "name": name,
            "kind": asset.kind,
            "state": stored.state,
            "bytes": asset.size,
            "licence": asset.licence,
            "what": asset.what,
            "path": str(stored.path) if stored.state == "ready" else None,
        })  # fmt: skip
    for record in hub.repositories():
        found.append({
            "name": record["name"],
            "kind": "Hugging Face",
            "state": "ready" if Path(record["path"]).is_dir() else "absent",
            "bytes": sum(file["size"] for file in record["files"]),
            "licence": "see its model card",
            "what": record["source"],
            "path": record["path"],
        })  # fmt: skip
    rows = [(m["name"], m["kind"], m["state"], megabytes(m["bytes"]), m["licence"], m["what"]) for m in found]
    table(("model", "kind", "here", "size", "licence", "what"), rows)
    say(f"store: {hub.home()}; fetch one with: volvelle get NAME, or any Hugging Face owner/name")
    return found


def _runs(root: Path) -> list[dict[str, Any]]:
    from volvelle.runs import scan

    found = scan(root)
    if not found:
        say(f"no runs in {root}/")
    else:
        keys = ("kind", "base_model", "created")
        rows = [(run.path, run.status, *(run.manifest.get(key) for key in keys)) for run in found]
        table(("run", "status", "kind", "base model", "created"), rows)
    return [{"path": str(run.path), **run.manifest, "status": run.status} for run in found]
