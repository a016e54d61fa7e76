"""Max-unpooling: a decoder that puts values back where pooling took them, beside nearest and bilinear enlargement."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor, nn

CLAIM = Claim(
    title="Max-unpooling: upsampling by remembered places",
    family="resampling",
    paper=Paper(
        "Badrinarayanan et al.",
        2017,
        "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation",
        "abstract and section 3",
        "https://arxiv.org/abs/1511.00561",
    ),
    sentence="the decoder uses pooling indices computed in the max-pooling step of the corresponding encoder to "
    "perform non-linear upsampling; this eliminates the need for learning to upsample; it improves boundary "
    "delineation",
    measured_by="fp64: values put back beside torch, a loop, and pooling again; networks alike but for how the decoder "
    "enlarges, trained to name each pixel's garment in noisy pictures of four: boundary IoU and mean IoU on pictures "
    "that none was trained on (quick: no training)",
    summary="Puts pooled values back at the places that pooling remembered: outlines stay, and nothing is learnt.",
    summary_zh="按池化时记下的位置把数值放回原处：轮廓得以保留，且无需学习参数。",
    seconds={"quick": 20, "full": 900},
    parts=("functional.max_unpool2d", "functional.resize_nearest", "functional.resize_bilinear"),
)

WIDTH, STEPS, SEEDS = 24, 400, 3
KINDS = ("unpooling", "nearest", "bilinear")


def measure(budget: Budget) -> Measurement:
    """The operator; full: three seeds of three networks too."""
    from volvelle.claims.garments import unless_missing

    findings, notes = _operator(), list[str]()
    setting: dict[str, object] = {"dtype of the operator": "fp64"}
    if budget == "full":
        with unless_missing(notes):
            findings += _trained()
            setting |= {"data": "Fashion-MNIST, four garments in noise, 56 x 56; 2000 to train, 300 to test",
                        "steps": STEPS, "batch": 64, "seeds": SEEDS, "width": WIDTH}  # fmt: skip
    return Measurement(findings, setting=setting, notes=notes)


def _operator() -> list[Finding]:
    """Pooled, put back, pooled again, for windows that fill the picture and windows that do not."""
    import torch
    from torch.nn import functional as F

    from volvelle.parts.resampling import unpooling

    draw = torch.Generator().manual_seed(0)
    again = beside = misplaced = 0.0
    for kernel, stride, padding, side in ((2, 2, 0, 16), (3, 3, 1, 17), (3, 2, 1, 15), (2, 2, 0, 17)):
        x = torch.rand(3, 4, side, side + 2, generator=draw, dtype=torch.float64) + 0.5
        pooled, at = F.max_pool2d(x, kernel, stride, padding, return_indices=True)
        back = unpooling.max_unpool2d(pooled, at, kernel, stride, padding, output_size=x.shape[-2:])
        again = max(again, float((F.max_pool2d(back, kernel, stride, padding) - pooled).abs().max()))
        misplaced = max(misplaced, float((back - x).where(back != 0, torch.zeros_like(x)).abs().max()))
        flat = torch.zeros_like(x).flatten(2)
        for image in range(3):
            for channel in range(4):
                for place, value in zip(at[image, channel].flatten(), pooled[image, channel].flatten(), strict=True):
                    flat[image, channel, place] = value
        beside = max(beside, float((back - flat.view_as(x)).abs().max()))
    return [
        at_most("put back and pooled again: largest difference", again, 0),
        at_most("values that stand elsewhere than in the picture: largest difference", misplaced, 0),
        at_most("difference from a loop over the places", beside, 0),
    ]


def _trained() -> list[Finding]:
    """Outlines and regions that each kind of decoder finds."""
    from volvelle.claims.garments import garments, scenes, two_threads

    data, (others, their_labels) = garments(20000, 2000)
    held = scenes(others, their_labels, 300, seed=0)
    with two_threads():
        runs = {kind: [figures(kind, data, held, seed) for seed in range(SEEDS)] for kind in KINDS}
    findings = list[Finding]()
    for number, what in enumerate(("boundary IoU", "mean IoU")):
        mean = {kind: statistics.mean(each[number] for each in found) for kind, found in runs.items()}
        for kind, found in runs.items():
            values = [each[number] for each in found]
            findings.append(Finding(f"{kind}: {what}", mean[kind], "%", spread=(min(values), max(values))))
        if number == 0:
            gain = mean["unpooling"] - max(mean["nearest"], mean["bilinear"])
            findings.append(at_least("boundary IoU of unpooling less the better of the others", gain, 0.0, "points"))
    return findings


def network(kind: str, seed: int) -> nn.Module:
    """Two levels down and two up, all weights alike: only how the decoder enlarges differs."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from volvelle.claims.garments import PIXEL_CLASSES
    from volvelle.parts.resampling.interpolation import resize_bilinear, resize_nearest
    from volvelle.parts.resampling.unpooling import max_unpool2d

    def layer(channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()
        )  # fmt: skip

    class EncoderDecoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.ModuleList((layer(1), layer(WIDTH)))
            self.middle = layer(WIDTH)
            self.up = nn.ModuleList((layer(WIDTH), layer(WIDTH)))
            self.classes = nn.Conv2d(WIDTH, PIXEL_CLASSES, 1)

        def forward(self, x):
            places, sizes = [], []
            for part in self.down:
                x = part(x)
                sizes.append(x.shape[-2:])
                x, at = F.max_pool2d(x, 2, return_indices=True)
                places.append(at)
            x = self.middle(x)
            for part in self.up:
                at, size = places.pop(), sizes.pop()
                if kind == "unpooling":
                    x = max_unpool2d(x, at, 2, output_size=size)
                else:
                    x = (resize_nearest if kind == "nearest" else resize_bilinear)(x, size)
                x = part(x)
            return self.classes(x)

    torch.manual_seed(seed)
    return EncoderDecoder()


def figures(kind: str, data: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], seed: int) -> tuple[float, float]:
    """Train one network; its boundary IoU and mean IoU in percent."""
    from volvelle.claims.garments import PIXEL_CLASSES, learn_scenes, named_pixels
    from volvelle.parts.metrics.boundary import boundary_counts
    from volvelle.parts.metrics.confusion import confusion_matrix
    from volvelle.parts.metrics.overlap import mean_iou

    net = network(kind, seed)
    learn_scenes(net, data, STEPS, seed)
    found = named_pixels(net, held[0])
    both, either = (
        counts.sum(0).double() for counts in boundary_counts(found, held[1], PIXEL_CLASSES, ignore_index=None)
    )
    outlines = float((both / either)[either > 0].mean() * 100)
    return outlines, float(mean_iou(confusion_matrix(found, held[1], PIXEL_CLASSES)) * 100)
