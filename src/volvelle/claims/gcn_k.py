"""Large kernels in a segmenter's head: separable k x 1 and 1 x k convolutions against stacks of 3 x 3."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor, nn

CLAIM = Claim(
    title="Large kernels matter: global convolution",
    family="segmentation",
    paper=Paper(
        "Peng et al.",
        2017,
        "Large Kernel Matters: Improve Semantic Segmentation by Global Convolutional Network",
        "tables 1 to 3",
        "https://arxiv.org/abs/1703.02719",
    ),
    sentence="the performance of GCN consistently increases with the kernel size k; a stack of small kernels of the "
    "same field does worse as k grows",
    measured_by="small segmenters on one frozen ImageNet encoder, alike but for the layer that turns its maps into "
    "scores: global convolution with k = 3, 7, 11, 15, or (k - 1) / 2 layers of 3 x 3 of the same field; mean IoU on "
    "pictures of which none was trained on, three seeds (quick: one seed, k = 3 and 15)",
    summary="A k x k kernel as k x 1 and 1 x k, twice: sees as much as a dense one for a fraction of the cost, and "
    "learns more easily than many small ones in a row.",
    summary_zh="把 k×k 卷积拆成两路 k×1 与 1×k：视野相同而代价小得多，也比堆叠小卷积更易训练。",
    seconds={"quick": 60, "full": 900},
    parts=("functional.global_convolution", "nn.GlobalConvolution", "nn.BoundaryRefinement"),
    recipe="volvelle train segment data=FOLDER model.kernel=15",
)

WIDTH = 24
"""Channels of the scores on the way."""
SIZE = (96, 128)
"""Height and width of the pictures: a kernel of 15 reaches across the maps of stride 16 and 32."""
BATCH = 16


def measure(budget: Budget) -> Measurement:
    """Train every head on the same maps of the encoder, computed once."""
    import torch

    from volvelle.errors import VolvelleError

    kernels, seeds, steps, pictures = ((3, 15), 1, 60, 96) if budget == "quick" else ((3, 7, 11, 15), 3, 200, 400)
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    try:
        train, val, where, classes = _pictures(pictures)
        encoder = _encoder()
        maps = [_maps(encoder, images) for images, _ in (train, val)]
        masks = [target for _, target in (train, val)]
        runs: dict[tuple[str, int], list[float]] = {}
        sizes: dict[tuple[str, int], int] = {}
        for k in kernels:
            for kind in ("gcn", "stack"):
                for seed in range(seeds):
                    decoder = _decoder(kind, k, encoder.channels, classes, seed)
                    sizes[kind, k] = sum(p.numel() for p in decoder.context.parameters())
                    runs.setdefault((kind, k), []).append(_train(decoder, maps, masks, classes, steps, seed))
    except VolvelleError as error:
        return Measurement(unmeasurable=f"the encoder or the pictures cannot be had: {error}")
    finally:
        torch.set_num_threads(before)
    setting = {
        "pictures": where, "size": SIZE, "classes": classes, "encoder": "efficientnet-lite0, frozen",
        "width": WIDTH, "steps": steps, "batch": BATCH, "seeds": seeds, "dtype": "fp32",
    }  # fmt: skip
    return Measurement(_findings(runs, sizes, kernels, steps), setting=setting, pictures={"iou": _chart(runs, kernels)})


def _findings(
    runs: dict[tuple[str, int], list[float]], sizes: dict[tuple[str, int], int], kernels: tuple[int, ...], steps: int
) -> list[Finding]:
    mean = {key: statistics.mean(values) for key, values in runs.items()}
    small, large = kernels[0], kernels[-1]
    gain = mean["gcn", large] - mean["gcn", small]
    findings = [
        at_least(f"mean IoU of gcn, k = {large}, minus k = {small}", gain, 0.0, "points"),
        at_least(f"mean IoU at k = {large}, gcn minus stack", mean["gcn", large] - mean["stack", large], 0.0, "points"),
        at_most(f"weights at k = {large}, gcn over stack", sizes["gcn", large] / sizes["stack", large], 1.0, "x"),
    ]
    if len(kernels) > 2:
        rises = [mean["gcn", b] >= mean["gcn", a] for a, b in itertools.pairwise(kernels)]
        findings.append(at_least("share of steps in k at which gcn does not lose", sum(rises) / len(rises), 1.0))
    for (kind, k), values in runs.items():
        name = f"{kind}, k = {k}: mean IoU after {steps} steps ({sizes[kind, k]:,} weights in these layers)"
        findings.append(Finding(name, mean[kind, k], "%", spread=(min(values), max(values))))
    return findings


def _pictures(count: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], str, int]:
    """Small pictures and masks to train and to measure on: CamVid's where it lies beside the checkout, else scenes."""
    from volvelle.data.masks import read_masks
    from volvelle.data.scenes import Scenes

    camvid = Path(__file__).resolve().parents[4] / "shared" / "data" / "camvid"
    if camvid.is_dir():
        sets: list[Any] = [read_masks(camvid, split=part) for part in ("train", "val")]
        where, classes = "CamVid at low resolution", len(sets[0].labels)
    else:
        sets = [Scenes(count, size=128, part="train"), Scenes(max(32, count // 4), size=128, part="val")]
        where, classes = "scenes of Fashion-MNIST garments", len(Scenes.labels)
    train, val = (_small(one, count) for one in sets)
    return train, val, where, classes


def _small(dataset: Any, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` pictures, evenly spread: uint8 (n, 3, y, x) and their masks (n, y, x)."""
    import numpy as np
    import torch
    from PIL import Image

    from volvelle.data.images import to_tensor
    from volvelle.data.text import spread

    images, masks = [], []
    for index in spread(range(len(dataset)), count):
        image, mask = dataset[index]
        high, wide = SIZE
        images.append(to_tensor(image.resize((wide, high), Image.Resampling.BILINEAR)))
        small = Image.fromarray(mask).resize((wide, high), Image.Resampling.NEAREST)
        masks.append(torch.from_numpy(np.array(small)))
    return torch.stack(images), torch.stack(masks)


def _encoder() -> Any:
    from volvelle.systems.backbone.load import backbone

    return backbone("efficientnet-lite0", weights="imagenet")


def _maps(encoder: Any, images: Tensor) -> list[Tensor]:
    """The encoder's four maps of all pictures."""
    import torch

    with torch.no_grad():
        parts = [encoder.features(encoder.preprocessing.normalise(part)) for part in images.split(BATCH)]
    return [torch.cat(found) for found in zip(*parts, strict=True)]


def _decoder(kind: str, k: int, channels: tuple[int, ...], classes: int, seed: int) -> Any:
    import torch
    from torch import nn

    from volvelle.systems.segmentation.config import GCN
    from volvelle.systems.segmentation.gcn_decoder import GCNDecoder

    def stack(inside: int, outside: int) -> nn.Module:
        """(k - 1) / 2 layers of 3 x 3, whose field is k x k; without nonlinearities, as global convolution has none."""
        layers = [nn.Conv2d(inside if not i else outside, outside, 3, padding=1) for i in range((k - 1) // 2)]
        return nn.Sequential(*layers)

    torch.manual_seed(seed)
    config = GCN(kernel=k, width=WIDTH)
    return GCNDecoder(config, channels, classes, context=stack if kind == "stack" else None)


def _train(decoder: Any, maps: list[list[Tensor]], masks: list[Tensor], classes: int, steps: int, seed: int) -> float:
    """Train on the first maps and return the mean IoU on the second, in percent."""
    import torch

    from volvelle.train.schedule import poly
    from volvelle.train.segment_objective import segmentation_loss

    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3, weight_decay=1e-4)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, poly(steps, warmup=max(1, steps // 20)))
    draw = torch.Generator().manual_seed(seed)
    weights = torch.ones(classes)
    torch.manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(masks[0]), (BATCH,), generator=draw)
        features = [one[chosen] for one in maps[0]]
        loss = segmentation_loss(decoder(features, features[0]), masks[0][chosen], weights).value
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return _iou(decoder, maps[1], masks[1], classes)


def _iou(decoder: nn.Module, maps: list[Tensor], masks: Tensor, classes: int) -> float:
    import torch
    from torch.nn import functional as F

    from volvelle.parts.metrics.confusion import ConfusionMatrix
    from volvelle.parts.metrics.overlap import mean_iou

    seen = ConfusionMatrix(classes)
    with torch.no_grad():
        for at in range(0, len(masks), BATCH):
            features = [one[at : at + BATCH] for one in maps]
            target = masks[at : at + BATCH]
            scores = F.interpolate(decoder(features, features[0]), size=target.shape[-2:], mode="bilinear")
            seen.update(scores.argmax(1).to(torch.uint8), target)
    return 100 * float(mean_iou(seen.matrix))


def _chart(runs: dict[tuple[str, int], list[float]], kernels: tuple[int, ...]) -> str:
    from volvelle.train.charts import Series, line_chart, standalone

    lines = [
        Series(label, [(float(k), statistics.mean(runs[kind, k])) for k in kernels], dots=True)
        for kind, label in (("gcn", "global convolution"), ("stack", "3 x 3 in a stack"))
    ]
    return standalone(line_chart(lines, x_label="k", y_label="mean IoU, %"))
