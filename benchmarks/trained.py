"""The figures of finished training runs, for the pages that quote them.

    python -m benchmarks.trained camvid|bccd|clicks|codecs RUN [RUN …] [--alone RUN]
    python -m benchmarks.trained priors RUN [RUN …] --judge RUN --data DATA
    python -m benchmarks.trained captions RUN [RUN …] --data DATA
    python -m benchmarks.trained boxes RUN [RUN …] --data DATA [--picture FILE]
    python -m benchmarks.trained summaries RUN [RUN …] --data FILE

Reads the run folders of `volvelle train` and `adapt`, and adds what they found to results/NAME.json; a run of the same
name is replaced. Nothing is trained here; the page says with which command. Priors are also asked for pictures of every
class, which the judge, a run of `train classify`, is shown; those that were told the captions of scenes, for garments
of every colour. Promptable models are asked for the mask of every box of a folder that has no masks, and some are
drawn. Summarisers, and what was adapted from them, are asked for the summaries of a file. Where a machine was busy with
other things too, --alone names the beginning of the same training, interrupted after some steps and with nothing beside
it: its median step says how long the whole takes.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol, tables
from benchmarks.support.caption_trials import captions
from benchmarks.support.summary_trials import summaries
from volvelle.cli.measured import chosen_part
from volvelle.cli.prompting import open_promptable
from volvelle.data.boxes import read_boxes
from volvelle.data.pictures import read_pictures
from volvelle.data.text import spread
from volvelle.errors import VolvelleError
from volvelle.runs import RunFolder
from volvelle.systems.generation.extractor import open_extractor
from volvelle.systems.generation.prior import read_prior
from volvelle.train.classify import data_folder
from volvelle.train.judge import open_judge
from volvelle.train.prior_measure import measure_prior
from volvelle.train.promptable_boxes import measure_boxes, picture_of_boxes

DRAWN = 3
"""Pictures of boxes and their masks on a sheet."""

KINDS = {
    "camvid": ("segment",), "bccd": ("detect",), "clicks": ("promptable",), "codecs": ("vqgan",),
    "priors": ("prior",), "captions": ("prior",), "boxes": ("promptable",), "summaries": ("summarize", "adapt"),
}  # fmt: skip
"""The kinds of runs that each table takes."""


def figures(path: Path, kinds: Sequence[str]) -> dict[str, Any]:
    """What a finished run found, of which steps, in which time."""
    run = RunFolder.open(path)
    manifest, config = run.manifest, run.config()
    if manifest["kind"] not in kinds or manifest["status"] != "finished":
        wanted = " or ".join(kinds)
        raise VolvelleError(f"{path} is a {manifest['status']} run of {manifest['kind']}, not a finished {wanted}")
    steps = [record["seconds"] for record in run.metrics() if record["event"] == "train"]
    taken = datetime.fromisoformat(manifest["ended"]) - datetime.fromisoformat(manifest["created"])
    return {
        "run": manifest["name"],
        "date": manifest["ended"],
        "measured_on": manifest.get("measured_on"),
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


def boxed(path: Path, data: str, picture: Path | None) -> dict[str, Any]:
    """How masks of boxes lie in pictures that nothing was trained on; some of them below each other in `picture`."""
    parts, model = read_boxes(data), open_promptable(path)
    folder = parts[chosen_part(data, list(parts), None)]
    found = measure_boxes(model, folder, precision=RunFolder.open(path).config()["precision"])
    if picture:
        rows = [Image.open(io.BytesIO(picture_of_boxes(model, folder, i))) for i in spread(range(len(folder)), DRAWN)]
        sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
        for number, row in enumerate(rows):
            sheet.paste(row, (0, sum(above.height for above in rows[:number])))
        sheet.save(picture, optimize=True)
    return {"data": Path(data).name, "boxes": len(found.boxes), "pairs": len(found.pairs), "after": found.metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(KINDS))
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--alone", type=Path, help="the beginning of the same training, with nothing beside it")
    parser.add_argument("--judge", type=Path, help="priors: a run of train classify")
    parser.add_argument("--data", help="priors, captions, boxes, summaries: whose held-out part they are measured on")
    parser.add_argument("--picture", type=Path, help="boxes: a PNG to draw some into")
    options = parser.parse_args()
    if options.name == "priors" and not (options.judge and options.data):
        parser.error("priors: --judge and --data are wanted")
    if options.name in ("captions", "boxes", "summaries") and not options.data:
        parser.error(f"{options.name}: --data is wanted")
    kept = {row["run"]: row for row in protocol.read(options.name).get("runs", [])}
    for path in options.run:
        row = figures(path, KINDS[options.name])
        if options.alone:
            row |= alone(options.alone, path)
        if options.name == "priors":
            row |= drawn(path, options.judge, options.data)
        if options.name == "captions":
            row |= captions(path, options.data)
        if options.name == "summaries":
            row |= summaries(path, options.data)
        if options.name == "boxes":
            row |= boxed(path, options.data, options.picture)
        kept[row["run"]] = row
        print(row)
    machine = protocol.machine(["torch"])
    print(protocol.write(options.name, {"runs": list(kept.values()), "machine": machine}))
    tables.write(options.name)


if __name__ == "__main__":
    main()
