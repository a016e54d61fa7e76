"""Which method adapts best under one budget: the comparison of `volvelle adapt method=compare` on WebNLG, in figures.

    python -m benchmarks.comparison [--quick] [--run FOLDER]

SmolLM2 in bf16; full fine-tuning, LoRA (rank 4 on all linear layers), DoRA, adapter and prefix, each at the best of
three learning rates. Reads ../shared/data/webnlg. Writes results/comparison.json; --run takes one that has finished.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol
from volvelle.adapt.methods import LoRA
from volvelle.runs import RunFolder
from volvelle.train.comparison import compare_methods
from volvelle.train.comparison_outcome import Row, with_gains
from volvelle.train.options import to_dict
from volvelle.train.recipes.compare import CompareMethods

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "webnlg"
PROMPT = '{% for t in triples %}{{ t | join(" | ") }}{% if not loop.last %} ; {% endif %}{% endfor %} =>'


def recipe(quick: bool) -> CompareMethods:
    """What is compared; `quick` is a smoke run."""
    size: dict[str, Any] = {"steps": 120, "held_out_size": 200, "samples": 64, "max_tokens": 64}
    if quick:
        size = {"steps": 4, "held_out_size": 4, "samples": 2, "max_tokens": 8}
    return CompareMethods(
        model="smollm2", data=str(DATA / "train.jsonl"), held_out=str(DATA / "dev.jsonl"), prompt=PROMPT,
        completion="{{ references }}", batch=4, precision="bf16",
        lora=LoRA(rank=4, alpha=16.0, targets="all-linear"), **size,
    )  # fmt: skip


def figures(run: Path) -> dict[str, Any]:
    """What a finished comparison found, and under which budget."""
    folder = RunFolder.open(run)
    manifest, config = folder.manifest, folder.config()
    rows = with_gains([Row(**row) for row in manifest["rows"]])
    kept = ("steps", "batch", "precision", "held_out_size", "samples", "lora", "compare")
    return {
        "model": manifest["base_model"],
        "date": manifest["ended"],
        "seconds": manifest["seconds"],
        "budget": {name: config[name] for name in kept},
        "rows": [{k: v for k, v in dataclasses.asdict(row).items() if k != "run"} for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: little work, nothing written")
    parser.add_argument("--run", type=Path, help="a finished comparison")
    options = parser.parse_args()
    if options.run is None and not DATA.is_dir():
        sys.exit(f"error: {DATA} is not there\ntip: --run FOLDER takes a comparison on data of your own")
    with tempfile.TemporaryDirectory() as scratch:
        path = options.run
        if path is None:
            made = recipe(options.quick)
            run = RunFolder.create("compare", root=Path(scratch), kind="compare", config=to_dict(made))
            compare_methods(made, run)
            path = run.path
        found = figures(path)
    for row in found["rows"]:
        print(row)
    if not options.quick:
        print(protocol.write("comparison", found | {"machine": protocol.machine(["torch"])}))


if __name__ == "__main__":
    main()
