"""What `eval`, `predict` and `export` do with a run that trained a detector, or with its weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from volvelle.cli.console import say
from volvelle.cli.measured import by_class, chosen_part
from volvelle.errors import VolvelleError
from volvelle.runs import RunFolder
from volvelle.systems.native_folder import is_model

if TYPE_CHECKING:
    from volvelle.data.boxes_augment import Fit
    from volvelle.systems.detection.model import Detector

KIND = "detect"
"""The kind of runs that this file knows."""


def is_detection(path: str | Path) -> bool:
    """Whether the path is a run folder of `train detect`, or a folder of `write_detector`."""
    run = _run(Path(path))
    return is_model(path, "detector") if run is None else run.manifest.get("kind") == KIND


def _run(folder: Path) -> RunFolder | None:
    """The run that lies there; None where there is another folder, or none."""
    return RunFolder.open(folder) if (folder / "manifest.json").is_file() else None


def evaluate(run: Path, data: str, *, split: str | None = None, on_bad: Literal["stop", "skip"] = "stop") -> int:
    """Measure a run's detector on pictures with boxes (their val part, when there is one), and print it."""
    from volvelle.cli.training import console
    from volvelle.data.boxes_augment import Fitted
    from volvelle.train.detect import read_parts
    from volvelle.train.detect_measure import measure
    from volvelle.train.recipes.detect import TrainDetect

    model, view = open_detector(run)
    folder = _run(run)
    with console() as observer:
        parts = read_parts(Path(data), replace(TrainDetect(), classes=model.classes, on_bad=on_bad), observer)
        pictures = parts[chosen_part(data, list(parts), split)]
        found = measure(
            model,
            Fitted(pictures, view),
            precision=folder.config().get("precision", "fp32") if folder else "fp32",
            progress=lambda done, total: observer.work("pictures", done, total),
        )
    worst = [pictures.source(index) for index in found.worst(3, trusted_score(run))]
    columns = {"boxes": "boxes", "ap": "AP", "ap_50": "AP at 0.5", "recall_100": "recall of 100"}
    by_class({"run": str(run), "data": data}, found.metrics, found.rows(model.classes), columns, worst)
    return 0


def predict(run: Path, images: Sequence[Path], out: Path, *, score: float | None = None) -> list[dict[str, Any]]:
    """Find objects in pictures with a run; write STEM-boxes.png into `out`, and say what was found.

    Boxes of less than `score` are left out; None: the score that was best on the pictures the run set aside. Each
    record names the file and lists boxes in the picture's pixels, surest first; small pictures are drawn larger.
    """
    from volvelle.cli.segmenting import free_name
    from volvelle.data.images import read_image
    from volvelle.systems.detection.inference import detect
    from volvelle.train.detect_pictures import PANEL, Drawn, resized_with_boxes
    from volvelle.train.segment_pictures import colours_of, png

    model, view = open_detector(run)
    least = trusted_score(run) if score is None else score
    colours = colours_of(model.classes, ())
    pictures = [(path, read_image(path)) for path in images]  # all before any is written
    out.mkdir(parents=True, exist_ok=True)
    records = list[dict[str, Any]]()
    for path, picture in pictures:
        found = detect(model, view.prepare(picture)[None])
        sure = found.mask[0] & (found.scores[0] >= least)
        corners = view.back(found.boxes[0][sure], *picture.size).tolist()
        labels, scores = found.labels[0][sure].tolist(), found.scores[0][sure].tolist()
        rows = list(zip(corners, labels, scores, strict=True))
        drawn = [Drawn((*box,), colours[label], f"{model.classes[label]} {sure:.2f}") for box, label, sure in rows]
        file = free_name(out, path, "boxes", records)
        file.write_bytes(png(resized_with_boxes(picture, drawn, max(picture.width, PANEL))))
        counts = {name: labels.count(number) for number, name in enumerate(model.classes) if number in labels}
        shown = ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"
        say(f"{path}: {shown} (score {least:.2f} or more)", f"  boxes    {file}")
        boxes = [
            {"class": model.classes[label], "score": round(sure, 4), "box": [round(value, 1) for value in box]}
            for box, label, sure in rows
        ]
        records.append({"image": str(path), "boxes": str(file), "objects": boxes})
    return records


def export(run: Path, out: Path) -> str:
    """Write the detector of a run as detector.onnx into `out`; how to load it."""
    from volvelle.systems.detection.onnx import export_onnx

    model, _ = open_detector(run)
    return f'onnxruntime.InferenceSession("{export_onnx(model, out)}")'


def open_detector(run: Path) -> tuple[Detector, Fit]:
    """The model of a run, or of a folder of `write_detector`, and how it wants its pictures."""
    from volvelle.data.boxes_augment import Fit
    from volvelle.systems.detection.load import read_detector

    folder = _run(run)
    weights = run / "weights" if folder else run
    if folder and not is_model(weights, "detector"):
        raise VolvelleError(f"{run}: has no weights yet ({folder.status})", tip=f"volvelle resume {run}")
    model = read_detector(weights)
    if folder and not folder.config().get("stretch", True):  # which weights did not say at first
        model.config = replace(model.config, stretch=False)
    return model, Fit(model.config.size, model.config.stretch)


def trusted_score(run: Path) -> float:
    """The least score that is worth showing."""
    folder = _run(run)
    return float(folder.manifest.get("trusted", 0.5)) if folder else 0.5
