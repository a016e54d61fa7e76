"""What `eval` and `predict` do with a run that trained a segmenter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from volvelle.cli.console import say
from volvelle.cli.measured import by_class
from volvelle.errors import VolvelleError
from volvelle.runs import RunFolder

if TYPE_CHECKING:
    from volvelle.data.masks_labels import Labels
    from volvelle.systems.segmentation.model import Segmenter
    from volvelle.train.recipes.segment import LookOptions

KIND = "segment"
"""The kind of runs that this file knows."""


def is_segmentation(path: str | Path) -> bool:
    """Whether the path is a run folder of `train segment`."""
    folder = Path(path)
    return (folder / "manifest.json").is_file() and RunFolder.open(folder).manifest.get("kind") == KIND


def evaluate(
    run: Path,
    data: str,
    *,
    split: str | None = None,
    looks: LookOptions | None = None,
    on_bad: Literal["stop", "skip"] = "stop",
) -> int:
    """Measure a run's segmenter on a folder of images with masks (its val part, when it has one), and print it.

    `looks` says how each picture is looked at; None: once, as it is.
    """
    from volvelle.cli.training import console
    from volvelle.data.masks import find_pairs, read_masks
    from volvelle.data.masks_augment import Whole
    from volvelle.train.observer import say_first
    from volvelle.train.segment import looks_of
    from volvelle.train.segment_measure import measure

    model, labels, precision = _open(run)
    splits = find_pairs(Path(data))[1]
    split = split or next((name for name in ("val", "test") if name in splits), None)
    with console() as observer:
        pictures = read_masks(
            data,
            split=split,
            labels=labels,
            on_bad=on_bad,
            progress=lambda done, total: observer.work(f"checking {data}", done, total),
        )
        observer.say(str(pictures) + (f" ({split})" if split else ""))
        say_first(observer, pictures.skipped)
        found = measure(
            model,
            Whole(pictures),
            looks=looks_of(looks) if looks else None,
            precision=precision,
            outlines=True,
            progress=lambda done, total: observer.work("pictures", done, total),
        )
    worst = [pictures.source(index) for index in found.worst(3)]
    columns = {"share": "pixels", "iou": "IoU", "accuracy": "accuracy"}
    by_class({"run": str(run), "data": data}, found.metrics, found.rows(model.classes), columns, worst)
    return 0


def predict(run: Path, images: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    """Segment pictures with a run; write STEM-mask.png and STEM-overlay.png into `out`, and say what was seen.

    The mask holds class numbers and opens in the classes' colours. Each record names the files and the share of the
    pixels that every class that was seen has, largest first.
    """
    import numpy as np
    from PIL import Image

    from volvelle.data.images import read_image, to_tensor
    from volvelle.systems.segmentation.inference import labels as labels_of
    from volvelle.train.segment_pictures import colours_of, overlay, png

    model, _, _ = _open(run)
    colours = colours_of(model.classes, model.config.colours)
    pictures = [(path, read_image(path)) for path in images]  # all before any is written
    out.mkdir(parents=True, exist_ok=True)
    records = []
    for path, picture in pictures:
        seen = labels_of(model, to_tensor(picture)[None])[0].numpy()
        files = {kind: free_name(out, path, kind, records) for kind in ("mask", "overlay")}
        mask = Image.fromarray(seen)
        mask.putpalette([channel for colour in colours for channel in colour])
        files["mask"].write_bytes(png(mask))
        files["overlay"].write_bytes(png(overlay(picture, seen, colours)))
        counts = np.bincount(seen.reshape(-1), minlength=len(colours)) / seen.size
        shares = {model.classes[i]: float(counts[i]) for i in np.argsort(-counts) if counts[i]}
        say(f"{path}: " + ", ".join(f"{name} {share:.1%}" for name, share in list(shares.items())[:5]))
        say(*(f"  {kind:<8} {file}" for kind, file in files.items()))
        records.append({"image": str(path), "classes": shares, **{kind: str(file) for kind, file in files.items()}})
    return records


def _open(run: Path) -> tuple[Segmenter, Labels, Any]:
    """The run's model, what its masks' values mean, and the number format it was trained in."""
    import json

    from volvelle.data.masks_labels import Labels
    from volvelle.systems.segmentation.load import is_segmenter, read_segmenter

    folder = RunFolder.open(run)
    weights = folder.path / "weights"
    if not is_segmenter(weights):
        raise VolvelleError(f"{run}: has no weights yet ({folder.status})", tip=f"volvelle resume {run}")
    labels = Labels.from_json(json.loads((weights / "labels.json").read_text(encoding="utf-8")))
    return read_segmenter(weights), labels, folder.config().get("precision", "fp32")


def free_name(out: Path, image: Path, kind: str, records: Sequence[dict[str, Any]]) -> Path:
    """A name that no picture of this call has taken: two folders may hold pictures of one name."""
    taken = {record[kind] for record in records}
    name, number = out / f"{image.stem}-{kind}.png", 2
    while str(name) in taken:
        name, number = out / f"{image.stem}-{number}-{kind}.png", number + 1
    return name
