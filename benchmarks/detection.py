"""Detectors: what a region costs R-FCN's head and Faster R-CNN's, and how long a picture takes from bytes to boxes.

    python -m benchmarks.detection [--quick] [--only heads latency] [--rounds 5] [--threads N] [--run FOLDER]

heads: everything behind the backbone's last map (ResNet-50 at 600 x 1000 pixels, 20 classes), for 100 to 2000 regions;
the slope is the cost at 2000 over that at 100. latency: ThunderNet-SNet49 at 320 pixels, one picture, bytes in, boxes
out, stage by stage; with --run the weights of a trained detector, on whose scores suppression has its usual work.
Writes results/detection.json; --quick prints only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol, tables
from volvelle.systems.detection import Detector, detector, read_detector, thundernet
from volvelle.systems.detection.inference import detect, ready

PARTS = ("heads", "latency")
REGIONS = (100, 300, 1000, 2000)
HEADS = {"R-FCN": "rfcn-resnet-50", "Faster R-CNN": "faster-rcnn-resnet-50"}
PICTURES = 10
"""Pictures of one variant in a round."""


def main() -> None:
    parser = protocol.parser(__doc__, PARTS)
    parser.add_argument("--run", type=Path, help="weights of a trained detector for latency")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds = options.rounds or (2 if options.quick else 5)
    with protocol.alone(), torch.no_grad():
        facts = protocol.machine(("torch",))
        record = protocol.read("detection") | {"machine": facts}
        for part in options.only:
            if part == "heads":
                record[part] = heads(rounds, quick=options.quick)
            else:
                record[part] = latency(rounds, options.run, quick=options.quick)
            if not options.quick:
                print(protocol.write("detection", record))
                tables.write("detection")


def heads(rounds: int, *, quick: bool) -> dict[str, Any]:
    """Seconds of neck and head at each number of regions, and the slope of each head."""
    size = (160, 224) if quick else (600, 1000)
    variants: dict[str, Callable[[], object]] = {}
    for who, name in HEADS.items():
        model = detector(name, 20).eval()
        for count in REGIONS[:: len(REGIONS) - 1] if quick else REGIONS:
            variants[f"{who}, {count}"] = behind_the_backbone(model, size, count)
    series = protocol.interleave(variants, rounds=rounds, most=4 * rounds, best_of=1 if quick else 5)
    slopes = {who: protocol.compare(series, f"{who}, {REGIONS[0]}", f"{who}, {REGIONS[-1]}") for who in HEADS}
    for who, slope in slopes.items():
        print(f"heads: {who}: {REGIONS[-1]} regions cost {protocol.shown(slope)} of {REGIONS[0]}", flush=True)
    return {"size": size, "seconds": {name: one.summary() for name, one in series.items()}, "slopes": slopes}


def behind_the_backbone(model: Detector, size: tuple[int, int], count: int) -> Callable[[], object]:
    """Neck and head on random maps of a picture of that size, and on `count` random regions."""
    draw = torch.Generator().manual_seed(0)
    channels, strides = model.backbone.channels, model.backbone.strides
    maps = [
        torch.randn(1, c, *(-(-side // s) for side in size), generator=draw)
        for c, s in zip(channels, strides, strict=True)
    ]
    corner = torch.rand(1, count, 2, generator=draw)
    corners = torch.cat((corner * 0.6, corner * 0.6 + 0.05 + 0.35 * torch.rand(1, count, 2, generator=draw)), 2)
    boxes = corners * torch.tensor([size[1], size[0]] * 2)
    sizes = torch.tensor([size])

    def work() -> Tensor:
        _, features = model.neck(maps, sizes, size)
        return model.roi_head(features, boxes).logits

    return work


def latency(rounds: int, run: Path | None, *, quick: bool) -> dict[str, Any]:
    """Pictures a second, and the share of each stage; the stages are timed apart from the whole."""
    model = ready(read_detector(run) if run else thundernet("snet49", 3))
    side = 96 if quick else model.config.size
    pixels = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[side, side]])
    x = model.preprocessing.normalise(pixels).contiguous(memory_format=torch.channels_last)
    found = model.look(model.backbone.features(x), sizes, (side, side))
    regions = model.proposer.propose(found, sizes, model.proposer.options.testing)
    scored = model.roi_head(found.features, regions.boxes)
    stages: dict[str, Callable[[], object]] = {
        "all": lambda: detect(model, pixels, sizes),
        "pixels": lambda: model.preprocessing.normalise(pixels).contiguous(memory_format=torch.channels_last),
        "network": lambda: model.look(model.backbone.features(x), sizes, (side, side)),
        "proposals": lambda: model.proposer.propose(found, sizes, model.proposer.options.testing),
        "head": lambda: model.roi_head(found.features, regions.boxes),
        "post-processing": lambda: model.post(scored, regions, sizes),
    }
    repeats = 2 if quick else PICTURES
    series = protocol.interleave(
        {name: lambda work=work: [work() for _ in range(repeats)] for name, work in stages.items()},
        rounds=rounds,
        most=4 * rounds,
    )
    seconds = {name: one.summary()["wall_median"] / repeats for name, one in series.items()}
    shares = {name: seconds[name] / seconds["all"] for name in stages if name != "all"}
    print(f"latency: {1 / seconds['all']:.1f} images/s; " + ", ".join(f"{k} {v:.0%}" for k, v in shares.items()))
    return {
        "side": side, "detector": run.name if run else "random weights", "images_per_second": 1 / seconds["all"],
        "shares": shares, "seconds": {name: one.summary() for name, one in series.items()}, "pictures": repeats,
    }  # fmt: skip


if __name__ == "__main__":
    main()
