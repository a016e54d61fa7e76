"""What `eval` does with a promptable model, a run's or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from volvelle.cli.console import result, say
from volvelle.cli.measured import by_class, chosen_part, percent
from volvelle.cli.models import Precision, choose_dtype
from volvelle.errors import UsageError, VolvelleError
from volvelle.runs import RunFolder

if TYPE_CHECKING:
    from volvelle.systems.segmentation.sam.model import Sam
    from volvelle.train.observer import Observer
    from volvelle.train.precision import Kind

KIND = "promptable"
"""The kind of runs that this file knows."""
PAGES = Path("predictions")
"""Where the page of a checkpoint goes, which has no folder of a run."""
SHOWN = 6
"""Pictures on the page of an evaluation by boxes."""


def is_run(path: str | Path) -> bool:
    """Whether the path is a run folder of `train promptable`."""
    folder = Path(path)
    return (folder / "manifest.json").is_file() and RunFolder.open(folder).manifest.get("kind") == KIND


def is_promptable(path: str | Path) -> bool:
    """Whether the path is a run folder of `train promptable`, or a checkpoint of Segment Anything's."""
    from volvelle.systems.segmentation.sam.load import holds_sam

    return is_run(path) or holds_sam(path)


def open_promptable(path: Path) -> Sam:
    """The model of a run or a checkpoint. VolvelleError where a run has no weights yet."""
    from volvelle.systems.segmentation.sam.load import is_sam, load_sam

    if not is_run(path):
        return load_sam(path)
    folder = RunFolder.open(path)
    if not is_sam(folder.path / "weights"):
        raise VolvelleError(f"{path}: has no weights yet ({folder.status})", tip=f"volvelle resume {path}")
    return load_sam(folder.path / "weights")


def evaluate(
    path: Path,
    data: str,
    *,
    split: str | None = None,
    on_bad: Literal["stop", "skip"] = "stop",
    precision: Precision = "auto",
) -> int:
    """Measure a model on pictures with masks of objects, by clicks; on pictures with boxes alone, by these.

    `auto` is what a run was trained in; for a checkpoint bf16 where the hardware multiplies it, else fp32.
    """
    from volvelle.cli.training import console
    from volvelle.data.promptable import holds_masks

    model, config = open_promptable(path), RunFolder.open(path).config() if is_run(path) else {}
    kind = _kind(precision, config)
    with console() as observer:
        if holds_masks(data):
            return _by_clicks(path, model, data, config, kind, split=split, on_bad=on_bad, observer=observer)
        return _by_boxes(path, model, data, kind, split=split, on_bad=on_bad, observer=observer)


def _kind(precision: Precision, config: Mapping[str, Any]) -> Kind:
    """The number format to measure in. UsageError for the bits of language models' weights."""
    if precision == "int8" or precision == "int4":
        raise UsageError(f"precision={precision}: is for language models", tip="precision=fp32, bf16 or fp16")
    if precision != "auto":
        return precision
    if "precision" in config:
        return config["precision"]
    import torch

    return "bf16" if choose_dtype("auto")[0] == torch.bfloat16 else "fp32"


def _by_clicks(
    run: Path,
    model: Sam,
    data: str,
    config: dict[str, Any],
    precision: Kind,
    *,
    split: str | None,
    on_bad: Literal["stop", "skip"],
    observer: Observer,
) -> int:
    from volvelle.data.promptable import read_objects
    from volvelle.train.promptable_measure import measure

    parts = read_objects(
        data,
        least=int(config.get("least", 1)),
        numbers=config.get("numbers", "classes"),
        on_bad=on_bad,
        progress=observer.work,
    )
    pictures = parts[chosen_part(data, list(parts), split)]
    observer.say(str(pictures))
    found = measure(
        model,
        pictures,
        clicks=config.get("clicks", (1, 2, 3, 5)),
        more=True,
        precision=precision,
        progress=lambda done, total: observer.work("pictures", done, total),
    )
    worst = [f"{pictures.source(one.picture)} at {one.clicks[0].x},{one.clicks[0].y}" for one in found.worst(3)]
    names = ("objects", "one_click", "all_clicks", "best_of_three")
    columns = {name: name.replace("_", " ") for name in names}
    by_class({"run": str(run), "data": data}, found.metrics, found.rows(pictures.classes), columns, worst)
    return 0


def _by_boxes(
    run: Path,
    model: Sam,
    data: str,
    precision: Kind,
    *,
    split: str | None,
    on_bad: Literal["stop", "skip"],
    observer: Observer,
) -> int:
    from volvelle.data.boxes import read_boxes
    from volvelle.data.text import spread
    from volvelle.train.promptable_boxes import measure_boxes, picture_of_boxes
    from volvelle.train.report import Report

    parts = read_boxes(data, on_bad=on_bad, progress=lambda done, total: observer.work(f"checking {data}", done, total))
    pictures = parts[chosen_part(data, list(parts), split)]
    observer.say(f"{pictures}; no masks there, so boxes are the prompts")
    found = measure_boxes(
        model,
        pictures,
        precision=precision,
        progress=lambda done, total: observer.work("pictures", done, total),
    )
    words = {
        "inside": "of a mask's pixels lie inside its box",
        "fit": "IoU of the mask's own box with its box",
        "empty": "of the boxes got no mask",
        "overlap": "of the smaller of two neighbours' masks is the other's too",
        "boxes_overlap": "the same of their boxes",
        "separated": "of neighbours' masks overlap by a tenth at most",
    }
    for name, value in found.metrics.items():
        say(f"{name:<14} {percent(value):>9}   {words[name]}")
    page = Report(f"{run.name} on {Path(data).name}", subtitle="Boxes as prompts; nothing of this was trained on.")
    page.tiles([(name, percent(value), "") for name, value in found.metrics.items()])
    page.text(f"{len(found.boxes) + found.empty:,} boxes, {len(found.pairs):,} pairs of neighbours. " + "; ".join(
        f"{name}: {text}" for name, text in words.items()
    ) + ".")  # fmt: skip
    for index in spread(range(len(pictures)), SHOWN):
        page.figure(picture_of_boxes(model, pictures, index), Path(pictures.source(index)).name)
    file = page.write((run if is_run(run) else PAGES) / f"eval-{Path(data).stem}.html")
    say(f"page     {file}")
    counts = {"boxes": len(found.boxes) + found.empty, "neighbours": len(found.pairs)}
    result({"run": str(run), "data": data, **found.metrics, **counts, "page": str(file)})
    return 0
