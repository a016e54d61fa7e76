"""The figures of finished training runs, for the pages that quote them.

    python -m benchmarks.trained camvid|bccd|clicks RUN [RUN …]

Reads the run folders of `volvelle train`, and adds what they found to results/NAME.json; a run of the same name is
replaced. Nothing is trained here; the page says with which command.
"""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol, tables
from volvelle.errors import VolvelleError
from volvelle.runs import RunFolder

KINDS = {"camvid": "segment", "bccd": "detect", "clicks": "promptable"}


def figures(path: Path, kind: str) -> dict[str, Any]:
    """What a finished run found, of which steps, in which time."""
    run = RunFolder.open(path)
    manifest, config = run.manifest, run.config()
    if manifest["kind"] != kind or manifest["status"] != "finished":
        raise VolvelleError(f"{path} is a {manifest['status']} run of train {manifest['kind']}, not a finished {kind}")
    trained = sum(record["seconds"] for record in run.metrics() if record["event"] == "train")
    taken = datetime.fromisoformat(manifest["ended"]) - datetime.fromisoformat(manifest["created"])
    return {
        "run": manifest["name"],
        "date": manifest["ended"],
        "measured_on": manifest["measured_on"],
        "steps": manifest["step"],
        "seed": config["seed"],
        "batch": config["batch"],
        "precision": config["precision"],
        "training_seconds": trained,
        "seconds": taken.total_seconds(),
        "after": manifest["after"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(KINDS))
    parser.add_argument("run", type=Path, nargs="+")
    options = parser.parse_args()
    kept = {row["run"]: row for row in protocol.read(options.name).get("runs", [])}
    for path in options.run:
        row = figures(path, KINDS[options.name])
        kept[row["run"]] = row
        print(row)
    machine = protocol.machine(["torch"])
    print(protocol.write(options.name, {"runs": list(kept.values()), "machine": machine}))
    tables.write(options.name)


if __name__ == "__main__":
    main()
