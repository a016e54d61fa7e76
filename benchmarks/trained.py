"""The figures of finished training runs, for the pages that quote them.

    python -m benchmarks.trained camvid|bccd|clicks|codecs RUN [RUN …] [--alone RUN]
    python -m benchmarks.trained priors RUN [RUN …] --judge RUN --data DATA
    python -m benchmarks.trained captions RUN [RUN …] --data DATA

Reads the run folders of `volvelle train`, and adds what they found to results/NAME.json; a run of the same name is
replaced. Nothing is trained here; the page says with which command. Priors are also asked for pictures of every class,
which the judge, a run of `train classify`, is shown; those that were told the captions of scenes, for garments of every
colour. Where a machine was busy with other things too, --alone names the beginning of the same training, interrupted
after some steps and with nothing beside it: its median step says how long the whole takes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol, tables
from benchmarks.support.caption_trials import captions
from volvelle.data.pictures import read_pictures
from volvelle.errors import VolvelleError
from volvelle.runs import RunFolder
from volvelle.systems.generation.extractor import open_extractor
from volvelle.systems.generation.prior import read_prior
from volvelle.train.classify import data_folder
from volvelle.train.judge import open_judge
from volvelle.train.prior_measure import measure_prior

KINDS = {
    "camvid": "segment", "bccd": "detect", "clicks": "promptable", "codecs": "vqgan", "priors": "prior",
    "captions": "prior",
}  # fmt: skip


def figures(path: Path, kind: str) -> dict[str, Any]:
    """What a finished run found, of which steps, in which time."""
    run = RunFolder.open(path)
    manifest, config = run.manifest, run.config()
    if manifest["kind"] != kind or manifest["status"] != "finished":
        raise VolvelleError(f"{path} is a {manifest['status']} run of train {manifest['kind']}, not a finished {kind}")
    steps = [record["seconds"] for record in run.metrics() if record["event"] == "train"]
    taken = datetime.fromisoformat(manifest["ended"]) - datetime.fromisoformat(manifest["created"])
    return {
        "run": manifest["name"],
        "date": manifest["ended"],
        "measured_on": manifest["measured_on"],
        "steps": manifest["step"],
        "seed": config["seed"],
        "batch": config["batch"],
        "precision": config["precision"],
        "training_seconds": sum(steps),
        "step_seconds": statistics.median(steps),
        "seconds": taken.total_seconds(),
        "after": manifest["after"],
    }


def alone(path: Path, beside: Path) -> dict[str, Any]:
    """The median step of the beginning of the same training as `beside`, on an idle machine, and how many there are."""
    run, whole = RunFolder.open(path), RunFolder.open(beside)
    differing = {key for key, value in whole.config().items() if run.config().get(key) != value}
    if differing:
        raise VolvelleError(f"{path} is another training than {beside}: {', '.join(sorted(differing))}")
    steps = [record["seconds"] for record in run.metrics() if record["event"] == "train"]
    return {"alone_seconds": statistics.median(steps), "alone_steps": len(steps)}


def drawn(path: Path, judge: Path, data: str) -> dict[str, Any]:
    """What a classifier makes of a prior's pictures, and how far its features are from those of real ones."""
    who = open_judge(str(judge))
    prior = read_prior(path)
    assert prior.codec is not None
    _, held = read_pictures(data_folder(data))
    if held is None:
        raise VolvelleError(f"{data} has no part to measure on")
    extractor = open_extractor(str(judge), size=prior.layout.rows * prior.codec.factor)
    found = measure_prior(prior, held, extractor=extractor, judge=who)
    metrics, name = found.metrics, f"FD-{extractor.name}"
    figures = {"distance": metrics[name], "distance_floor": metrics[f"{name} floor"]}
    figures |= {key.replace(" ", "_"): value for key, value in metrics.items() if not key.startswith("FD")}
    return {"judge": judge.name, "distances_by": name, "drawn": len(found.pictures), "after": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(KINDS))
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--alone", type=Path, help="the beginning of the same training, with nothing beside it")
    parser.add_argument("--judge", type=Path, help="priors: a run of train classify")
    parser.add_argument("--data", help="priors, captions: whose held-out part they are measured on")
    options = parser.parse_args()
    if options.name == "priors" and not (options.judge and options.data):
        parser.error("priors: --judge and --data are wanted")
    if options.name == "captions" and not options.data:
        parser.error("captions: --data is wanted")
    kept = {row["run"]: row for row in protocol.read(options.name).get("runs", [])}
    for path in options.run:
        row = figures(path, KINDS[options.name])
        if options.alone:
            row |= alone(options.alone, path)
        if options.name == "priors":
            row |= drawn(path, options.judge, options.data)
        if options.name == "captions":
            row |= captions(path, options.data)
        kept[row["run"]] = row
        print(row)
    machine = protocol.machine(["torch"])
    print(protocol.write(options.name, {"runs": list(kept.values()), "machine": machine}))
    tables.write(options.name)


if __name__ == "__main__":
    main()
