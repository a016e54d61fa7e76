"""python -m tests.mutation [FILE…] [--jobs N]: try every mutant of the files that matter most (./check slow).

A mutant that no test kills is named, and the command fails, unless argued.toml says why it changes nothing. An argument
whose mutant is gone, or killed, is named too. The whole run is kept in build/mutation.json. Where no file is named
those run whose survivors were looked at; of the others some are known to survive that nobody has judged yet.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tomllib
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from tests.mutation.mutants import SOURCE, Mutant, mutants
from tests.mutation.session import Trial, Verdict

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]

# Of each file the tests that ought to notice; the file's own examples always belong to them.
TARGETS = {
    "decode/accept_exact": ("decode/test_accept_loop.py", "decode/test_accept_exact.py"),
    "decode/accept_typical": ("decode/test_accept_typical.py",),
    "decode/trees": ("decode/test_trees.py",),
    "parts/metrics/confusion": ("parts/metrics/test_confusion.py",),
    "parts/metrics/overlap": ("parts/metrics/test_overlap.py",),
    "parts/metrics/average_precision": ("parts/metrics/test_average_precision.py",),
    "parts/metrics/box_matching": ("parts/metrics/test_box_matching.py", "parts/metrics/test_average_precision.py"),
    "parts/metrics/mean_average_precision": (
        "parts/metrics/test_box_matching.py",
        "parts/metrics/test_average_precision.py",
    ),
    "parts/metrics/boundary": ("parts/metrics/test_boundary.py",),
    "parts/metrics/lovasz": ("parts/metrics/test_lovasz.py",),
    "parts/metrics/frechet": ("parts/metrics/test_picture_quality.py",),
    "parts/metrics/psnr": ("parts/metrics/test_picture_quality.py",),
    "parts/metrics/ssim": ("parts/metrics/test_picture_quality.py",),
    "parts/metrics/rouge": ("parts/metrics/test_rouge.py",),
    "parts/regions/nms": ("parts/regions/test_nms.py",),
    "parts/regions/boxes": ("parts/regions/test_boxes.py",),
    "parts/regions/iou": ("parts/regions/test_boxes.py",),
    "parts/regions/soft_nms": ("parts/regions/test_nms.py",),
    "parts/regions/masks": ("parts/regions/test_masks.py",),
    "parts/regions/roi_align": ("parts/regions/test_pooling.py",),
    "parts/regions/ps_roi_align": ("parts/regions/test_pooling.py",),
}

REVIEWED = (
    "decode/accept_exact", "decode/accept_typical", "decode/trees", "parts/metrics/confusion", "parts/metrics/overlap",
    "parts/metrics/average_precision", "parts/metrics/boundary", "parts/metrics/frechet", "parts/metrics/lovasz",
    "parts/metrics/psnr", "parts/metrics/rouge", "parts/regions/boxes", "parts/regions/iou", "parts/regions/masks",
)  # fmt: skip
"""The files whose survivors were looked at, one by one: what runs when no file is named."""


def argued() -> dict[tuple[str, str, str, str], str]:
    """The survivors that are right to survive, by `Mutant.key`, with the reason."""
    found = {}
    for entry in tomllib.loads((HERE / "argued.toml").read_text()).get("equivalent", []):
        now = entry["now"]
        for one in [now] if isinstance(now, str) else now:
            found[entry["file"], entry["in"], entry["was"], one] = entry["why"]
    return found


def main() -> int:
    """Try, say, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("files", nargs="*", help="files from src/volvelle on, without .py; all of them by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants tried at a time")
    options = parser.parse_args()
    unknown = [file for file in options.files if file not in TARGETS]
    if unknown:
        parser.error(f"no such file: {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    files = options.files or list(REVIEWED)
    trial = Trial([mutant for file in files for mutant in mutants(file)], options.jobs, _told)
    tests = dict.fromkeys(f"tests/{test}" for file in files for test in TARGETS[file])
    arguments = [*(str(SOURCE / f"{file}.py") for file in files), *tests, "-q", "-s", "-m", "not slow and not gpu"]
    os.chdir(REPOSITORY)
    status = pytest.main([*arguments, "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0"], [trial])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) or not trial.verdicts:
        return 1
    _keep(trial.verdicts)
    return _summed(files, trial.verdicts)


def _told(verdict: Verdict) -> None:
    if not verdict.killed and verdict.mutant.key not in argued():
        print(f"survived {verdict.tried} tests: {_shown(verdict.mutant)}", flush=True)


def _shown(mutant: Mutant) -> str:
    return f"{mutant.file}.py:{mutant.lines[0]} in {mutant.function}\n    - {mutant.was}\n    + {mutant.now}"


def _keep(verdicts: list[Verdict]) -> None:
    path = REPOSITORY / "build" / "mutation.json"
    path.parent.mkdir(exist_ok=True)
    rows = [{**v.mutant._asdict(), "killed": v.killed, "by": v.by, "tried": v.tried} for v in verdicts]
    for row in rows:
        del row["source"]
    path.write_text(json.dumps(rows, indent=1))


def _summed(files: list[str], verdicts: list[Verdict]) -> int:
    reasons = argued()
    killed = {v.mutant.key for v in verdicts if v.killed}
    alive = {v.mutant.key for v in verdicts if not v.killed}
    stale = [key for key in reasons if key[0] in files and key not in alive]
    print(f"{'file':40} mutants  killed  argued  survived")
    for file in files:
        own = [v for v in verdicts if v.mutant.file == file]
        kinds = Counter("killed" if v.killed else "argued" if v.mutant.key in reasons else "survived" for v in own)
        print(f"{file:40} {len(own):7} {kinds['killed']:7} {kinds['argued']:7} {kinds['survived']:9}")
    for file, function, was, now in stale:
        what = "is killed" if (file, function, was, now) in killed else "is no mutant any more"
        print(f"argued.toml: {what}: {file} in {function}\n    - {was}\n    + {now}")
    return 1 if stale or alive - set(reasons) else 0


if __name__ == "__main__":
    sys.exit(main())
