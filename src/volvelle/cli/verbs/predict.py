"""`volvelle predict`: what is in a picture, by a known classifier or a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from volvelle.cli.console import result
from volvelle.errors import UsageError

EXAMPLES = (
    "volvelle predict efficientnet-lite0 photo.jpg",
    "volvelle predict runs/classify-1 photo.jpg other.png top=3",
)


@dataclass(frozen=True)
class Options:
    """Who looks, and at what."""

    model: Positional[str]
    """A known image model (efficientnet-lite0), a run of train classify or segment, or a folder of a network."""
    images: Positional[tuple[str, ...]]
    """Pictures, one or more."""
    top: int = 5
    """Classes to print for each picture."""
    out: str = "predictions"
    """Segmenters: the folder for masks and overlays."""


def main(options: Options) -> int:
    """Print the likeliest classes of every picture; a segmenter writes masks and overlays."""
    from volvelle.cli import classifying, segmenting

    if options.top < 1:
        raise UsageError(f"top: must be at least 1, got {options.top}")
    if not options.images:
        raise UsageError("predict: no picture", tip=f"volvelle predict {options.model} photo.jpg")
    if not segmenting.is_segmentation(options.model):
        return classifying.predict(options.model, options.images, top=options.top)
    images = segmenting.predict(Path(options.model), [Path(image) for image in options.images], Path(options.out))
    result({"model": options.model, "images": images})
    return 0
