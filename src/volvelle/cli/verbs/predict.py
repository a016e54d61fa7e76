"""`volvelle predict`: what is in a picture, and where, by a known classifier or a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from volvelle.cli.console import result
from volvelle.errors import UsageError

EXAMPLES = (
    "volvelle predict efficientnet-lite0 photo.jpg",
    "volvelle predict runs/classify-1 photo.jpg other.png top=3",
    "volvelle predict runs/detect-1 photo.jpg score=0.5",
)


@dataclass(frozen=True)
class Options:
    """Who looks, and at what."""

    model: Positional[str]
    """A known image model (efficientnet-lite0), a run of train classify, segment or detect, or a network's folder."""
    images: Positional[tuple[str, ...]]
    """Pictures, one or more."""
    top: int = 5
    """Classes to print for each picture."""
    out: str = "predictions"
    """Segmenters and detectors: the folder for masks, overlays and pictures with boxes."""
    score: float | None = None
    """Detectors: the least score of a box; None: the one that was best on the pictures the run set aside."""


def main(options: Options) -> int:
    """Print the likeliest classes of every picture; a segmenter writes masks and overlays, a detector draws boxes."""
    from volvelle.cli import classifying, detecting, segmenting

    if options.top < 1:
        raise UsageError(f"top: must be at least 1, got {options.top}")
    if not options.images:
        raise UsageError("predict: no picture", tip=f"volvelle predict {options.model} photo.jpg")
    files, out = [Path(image) for image in options.images], Path(options.out)
    if detecting.is_detection(options.model):
        images = detecting.predict(Path(options.model), files, out, score=options.score)
    elif segmenting.is_segmentation(options.model):
        images = segmenting.predict(Path(options.model), files, out)
    else:
        return classifying.predict(options.model, options.images, top=options.top)
    result({"model": options.model, "images": images})
    return 0
