"""What `eval` and `predict` do with classifiers: known ones, folders, and runs of `train classify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from volvelle.cli.console import result, say, table
from volvelle.cli.measured import figures
from volvelle.errors import UsageError
from volvelle.runs import RunFolder

if TYPE_CHECKING:
    from volvelle.data.text import OnBad
    from volvelle.systems.backbone.model import Backbone


KIND = "classify"
"""The kind of runs that this file knows."""


def is_classification(path: str | Path) -> bool:
    """Whether the path is a run folder of `train classify`."""
    folder = Path(path)
    return (folder / "manifest.json").is_file() and RunFolder.open(folder).manifest.get("kind") == KIND


def predict(model: str, images: Sequence[str], *, top: int) -> int:
    """Print the `top` likeliest classes of every picture."""
    import torch

    from volvelle.data.images import read_image

    net = open_classifier(model)
    how = net.preprocessing
    say(f"{net.config.name} at {how.size} px, {len(net.classes):,} classes; fp32 on the CPU")
    rows, records = [], []
    for path in images:
        with torch.no_grad():
            pixels = how.normalise(how.prepare(read_image(path))[None])
            shares = net(pixels).softmax(1)[0]
        values, numbers = shares.topk(min(top, len(net.classes)))
        answers = [(net.classes[n], v) for n, v in zip(numbers.tolist(), values.tolist(), strict=True)]
        rows += [(path if not i else "", f"{share:.3f}", name) for i, (name, share) in enumerate(answers)]
        found = [{"class": name, "probability": round(share, 6)} for name, share in answers]
        records.append({"image": str(path), "predictions": found})
    table(("picture", "share", "class"), rows)
    result({"model": model, "images": records})
    return 0


def open_classifier(model: str) -> Backbone:
    """A classifier by name, run or folder. Raises UsageError where only a network is known, without weights."""
    from volvelle.hub import ASSETS
    from volvelle.systems.backbone.load import backbone, read_backbone
    from volvelle.systems.backbone.names import find_config

    if is_classification(model):
        from volvelle.train.classify import open_run

        return open_run(Path(model))
    if Path(model).is_dir():
        return read_backbone(model)
    if Path(model).exists():
        raise UsageError(f"{model}: a file, but a name, a run or a folder is wanted")
    name = find_config(model).name
    if name not in ASSETS:
        known = [asset.name for asset in ASSETS.values() if asset.kind == "image backbone"]
        raise UsageError(f"{name}: no weights are known for this network", tip=f"known: {', '.join(known)}; or a run")
    return backbone(name, weights="imagenet")


def evaluate(path: str, data: str, *, batch: int, on_bad: OnBad) -> int:
    """Measure a run's classifier on a folder of pictures (its val or test part, when it has one), and print it."""
    from volvelle.cli.training import console
    from volvelle.train.classify import evaluate_run

    with console() as observer:
        _, found = evaluate_run(Path(path), data, batch=batch, on_bad=on_bad, observer=observer)
    figures(found.metrics)
    result({"model": path, "data": data, **found.metrics, "pictures": len(found.labels)})
    return 0
