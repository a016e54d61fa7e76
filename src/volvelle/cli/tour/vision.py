"""The stages of pictures: a classifier that knows a thousand classes, what its units see, a segmenter, a detector."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from volvelle.cli.console import say
from volvelle.cli.tour.frame import Tour

if TYPE_CHECKING:
    from PIL.Image import Image

    from volvelle.systems.backbone.model import Backbone

NETWORK = "efficientnet-lite0"
LAYER = "blocks.2"
"""The layer whose field is drawn over the picture: stride 8, far smaller than the picture."""


def classify(tour: Tour) -> None:
    """Name what is in a photo with real ImageNet weights, and draw what its units see of it."""
    import torch

    from volvelle.inspect import receptive_field
    from volvelle.systems.backbone import backbone

    net = backbone(NETWORK, weights="imagenet")
    photo, source = _photo()
    pixels = net.preprocessing.prepare(photo)
    with torch.no_grad():
        shares, numbers = net(net.preprocessing.normalise(pixels[None])).softmax(1)[0].topk(3)
    found = [(net.classes[n], share) for n, share in zip(numbers.tolist(), shares.tolist(), strict=True)]
    say(f"      {source}: " + ", ".join(f"{name} {share:.2f}" for name, share in found))
    side = net.preprocessing.size
    field = receptive_field(net, (1, 3, side, side))
    size = "whole" if field.features.whole else field.features.size[0]
    say(f"      a unit of {LAYER} sees {field[LAYER].size[0]} pixels of {side}, one of the last features {size}")
    _show(tour, net, photo, source, found)
    tour.report.figure(
        field.svg(_middle(net, photo)), f"What the middle units of {NETWORK}'s layers see of the picture."
    )
    tour.tiles.append(("in the photo", found[0][0], f"probability {found[0][1]:.2f}"))
    tour.results["classify"] = {"picture": source, "classes": dict(found)}
    tour.next += [f"volvelle predict {NETWORK} photo.jpg", f"volvelle inspect {NETWORK} rf input=photo.jpg"]


def segment(tour: Tour) -> None:
    """Train a segmenter for a moment on scenes, and measure it on scenes of garments that it never saw."""
    from volvelle.train.recipes.segment import TrainSegment
    from volvelle.train.segment import train_segment

    data = _scenes(tour)
    recipe = TrainSegment(
        data=str(data),
        crop=(96, 96),
        scale=(0.75, 1.25),
        steps=2 if tour.quick else 60,
        evaluate_every=None,
        average=0.9,
        checkpoint_every=None,
        samples=3,
    )
    run, outcome = tour.train("segment", "segment", recipe, train_segment)
    miou = outcome.after["miou"]
    say(f"      mean IoU {miou:.3f}, pixels right {outcome.after['pixel_accuracy']:.3f}, on scenes set aside")
    _panels(tour, run, data)
    tour.tiles.append(("segmentation", f"{100 * miou:.1f} % mean IoU", f"{recipe.steps} steps on drawn scenes"))
    tour.results["segment"] = {**outcome.after, "run": str(run.path)}
    tour.next += [f"volvelle eval {run.path} data={data}", "volvelle train segment data=FOLDER"]


def detect(tour: Tour) -> None:
    """Train a detector for a moment on the same scenes, and draw what it finds in others."""
    from volvelle.cli.detecting import predict
    from volvelle.train.detect import train_detect
    from volvelle.train.recipes.detect import TrainDetect

    data = _scenes(tour)
    recipe = TrainDetect(
        data=str(data),
        model=f"thundernet-{NETWORK}",
        weights="imagenet",
        size=96,
        upside_down=0,
        steps=2 if tour.quick else 240,
        warmup=20.0,
        average=0.98,
        evaluate_every=None,
        checkpoint_every=None,
        samples=2,
    )
    run, outcome = tour.train("detect", "detect", recipe, train_detect)
    precision = outcome.after["map_50"]
    say(f"      mAP at IoU 0.5: {precision:.3f}, on scenes set aside")
    pictures = sorted((data / "images" / "val").glob("*.png"))[:3]
    found = predict(run.path, pictures, tour.path / "found")
    tour.report.text(
        "ThunderNet on EfficientNet-Lite0, trained for some seconds on the boxes of the same scenes; what it finds in "
        "scenes it never saw."
    )
    for one in found:
        tour.report.figure(Path(one["boxes"]).read_bytes(), f"{len(one['objects'])} objects found")
    tour.tiles.append(("detection", f"{100 * precision:.0f} % mAP", f"at IoU 0.5, {recipe.steps} steps"))
    tour.results["detect"] = {**outcome.after, "run": str(run.path)}
    tour.next += [f"volvelle predict {run.path} photo.jpg", "volvelle train detect data=FOLDER"]


def _scenes(tour: Tour) -> Path:
    """Drawn scenes with masks and boxes, made once."""
    from volvelle.data.scenes import write_scenes

    folder = tour.path / "scenes"
    if (folder / "captions.jsonl").is_file():
        return folder
    return write_scenes(folder, train=24 if tour.quick else 240, val=4 if tour.quick else 24)


def _photo() -> tuple[Image, str]:
    """scikit-image's photo of a coffee where that package is installed, else a drawn scene."""
    from PIL import Image

    from volvelle.data.images import read_image
    from volvelle.data.scenes import Scenes

    package = find_spec("skimage")
    if package is not None and package.origin is not None:
        photo = Path(package.origin).parent / "data" / "coffee.png"
        if photo.is_file():
            return read_image(photo), "scikit-image's coffee.png"
    return Image.fromarray(Scenes(1, size=224).scene(0).image), "a drawn scene of Fashion-MNIST garments"


def _middle(net: Backbone, photo: Image) -> Image:
    """The part of the photo that the network is given."""
    from volvelle.data.images import to_image

    return to_image(net.preprocessing.prepare(photo))


def _show(tour: Tour, net: Backbone, photo: Image, source: str, found: list[tuple[str, float]]) -> None:
    from volvelle.train.segment_pictures import png

    tour.report.text(f"EfficientNet-Lite0 with its ImageNet weights; the picture is {source}.")
    tour.report.figure(png(_middle(net, photo)), source)
    tour.report.table(("class", "probability"), found)


def _panels(tour: Tour, run, data: Path) -> None:
    """Three scenes of the val part: picture, truth, what was seen, and where they differ."""
    from volvelle.data.images import to_tensor
    from volvelle.data.masks import read_masks
    from volvelle.systems.segmentation.load import read_segmenter
    from volvelle.train.segment_pictures import colours_of, legend, row_of_panels
    from volvelle.train.segment_report import seen_in

    model = read_segmenter(run.path / "weights")
    colours = colours_of(model.classes, model.config.colours)
    pictures = read_masks(data, split="val")
    tour.report.text(
        "GCN on EfficientNet-Lite0, trained for a few steps on drawn scenes of real Fashion-MNIST garments. "
        "From left to right: the picture, what is there, what was seen, and in white where they differ."
    ).html(legend(model.classes, colours))
    for index in range(3):
        image, truth = pictures[index]
        tour.report.figure(row_of_panels(image, truth, seen_in(model, to_tensor(image)), colours))
