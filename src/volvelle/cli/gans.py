"""What `eval` does with runs of `train gan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from volvelle.cli.console import result
from volvelle.cli.measured import figures
from volvelle.runs import RunFolder

if TYPE_CHECKING:
    from volvelle.data.text import OnBad

KIND = "gan"
"""The kind of runs that this file knows."""


def is_gan(path: str | Path) -> bool:
    """Whether the path is a run folder of `train gan`."""
    folder = Path(path)
    return (folder / "manifest.json").is_file() and RunFolder.open(folder).manifest.get("kind") == KIND


def evaluate(path: str, data: str, *, extractor: str | None, samples: int, on_bad: OnBad) -> int:
    """Measure a run's samples beside a folder of pictures (its val or test part, when it has one), and print it."""
    from volvelle.cli.training import console
    from volvelle.train.gan import evaluate_run

    with console() as observer:
        found = evaluate_run(Path(path), data, extractor=extractor, most=samples, on_bad=on_bad, observer=observer)
    figures(found)
    result({"model": path, "data": data, **found})
    return 0
