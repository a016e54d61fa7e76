"""What the metrics of segmentation see, and what they hide: pixel accuracy praises a model that sees nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

CLAIM = Claim(
    title="Metrics of segmentation: mean IoU beside pixel accuracy",
    family="metrics",
    paper=Paper(
        "Csurka et al.",
        2013,
        "What is a good evaluation measure for semantic segmentation?",
        "section 2",
        "https://doi.org/10.5244/C.27.32",
    ),
    sentence="a method that classifies all pixels as background can score well on overall pixel accuracy when the "
    "background covers most of the picture; the Jaccard index of each class does not reward it",
    measured_by="a prediction of background everywhere, on scenes of garments of which nearly everything is "
    "background: pixel accuracy against mean IoU and 1 / K; the identities that follow by algebra; the same masks "
    "averaged over the data set, over images and over (image, class) pairs; torchmetrics on the same masks",
    summary="One confusion matrix gives pixel accuracy, mean accuracy, mean IoU and weighted IoU; which of them says "
    "something, and how averages that go by one name differ.",
    summary_zh="由同一个混淆矩阵得到像素精度、平均精度、平均 IoU 与加权 IoU；说明哪些指标有意义，以及同名平均的差别。",
    seconds={"quick": 30, "full": 120},
    parts=(
        "functional.confusion_matrix",
        "functional.pixel_accuracy",
        "functional.mean_pixel_accuracy",
        "functional.mean_iou",
        "functional.frequency_weighted_iou",
        "functional.boundary_iou",
        "nn.ConfusionMatrix",
    ),
    recipe="volvelle train segment data=FOLDER",
)


def measure(budget: Budget) -> Measurement:
    """Count the prediction of nothing on 60 scenes (full: 400)."""
    import torch

    from volvelle.errors import VolvelleError
    from volvelle.parts.metrics.overlap import frequency_weighted_iou, mean_iou, mean_pixel_accuracy, pixel_accuracy

    try:
        masks = _masks(60 if budget == "quick" else 400)
    except VolvelleError as error:
        return Measurement(unmeasurable=f"no garments to draw: {error}")
    nothing = torch.zeros_like(masks)
    classes = int(masks.max()) + 1
    whole = _matrices(nothing, masks, classes).sum(0)
    k = int((whole.sum(1) > 0).sum())
    pa, iou, mean = (float(f(whole)) for f in (pixel_accuracy, mean_iou, mean_pixel_accuracy))
    weighted = float(frequency_weighted_iou(whole))
    findings = [
        at_least("pixel accuracy of background everywhere", pa, 0.8),
        at_most("its mean IoU times K (1 for one class of K)", iou * k, 1.0, "x"),
        at_least("the same from below", iou * k, 0.8, "x"),
        at_most("|mean accuracy - 1 / K|", abs(mean - 1 / k), 1e-12),
        at_most("|mean IoU - PA / K|: its one IoU is the pixel accuracy", abs(iou - pa / k), 1e-12),
        at_most("|weighted IoU - PA²|: that IoU, weighted by the background's share", abs(weighted - pa**2), 1e-12),
        Finding("mean IoU of background everywhere", iou),
        Finding("classes K that occur", k),
        *_averages(masks, classes),
    ]
    peer, versions = _peer(masks, classes)
    return Measurement(
        [*findings, *peer],
        peers=versions,
        setting={"scenes": len(masks), "pixels": masks.numel(), "dtype": "uint8 masks, int64 counts, fp64 means"},
        notes=() if versions else ("torchmetrics is not installed here: not compared",),
    )


def _masks(count: int) -> Tensor:
    import numpy as np
    import torch

    from volvelle.data.scenes import Scenes

    scenes = Scenes(count, size=128, seed=0, part="val")
    return torch.from_numpy(np.stack([scenes.scene(i).mask for i in range(count)]))


def _matrices(preds: Tensor, target: Tensor, k: int) -> Tensor:
    from volvelle.parts.metrics.confusion import ConfusionMatrix

    seen = ConfusionMatrix(k, per_image=True)
    seen.update(preds, target)
    return seen.images


def _blurred(masks: Tensor) -> Tensor:
    """A prediction that misses outlines: the masks, moved by two pixels."""
    return masks.roll((2, 2), dims=(1, 2))


def _averages(masks: Tensor, k: int) -> list[Finding]:
    """One prediction under each average, and its outlines."""
    from volvelle.parts.metrics.boundary import boundary_counts, boundary_iou
    from volvelle.parts.metrics.overlap import mean_iou

    images = _matrices(_blurred(masks), masks, k)
    found = {a: float(mean_iou(images, average=a)) for a in ("dataset", "image", "pair")}
    zero = float(mean_iou(images, average="image", absent="zero"))
    outline = float(boundary_iou(*boundary_counts(_blurred(masks), masks, k)))
    apart = _spread([*found.values(), zero])
    return [
        *(Finding(f"masks moved by two pixels: mean IoU, average={name}", value) for name, value in found.items()),
        Finding("the same, average=image with absent classes counted as 0", zero),
        at_least("largest difference between averages that all go by the name mean IoU", apart, 0.05),
        at_most("boundary IoU of the same masks over their mean IoU", outline / found["dataset"], 1.0, "x"),
    ]


def _spread(values: list[float]) -> float:
    return max(values) - min(values)


def _peer(masks: Tensor, k: int) -> tuple[list[Finding], dict[str, str]]:
    """Differences from torchmetrics on masks that are partly wrong."""
    from importlib import metadata
    from importlib.util import find_spec

    if find_spec("torchmetrics") is None:
        return [], {}
    import torchmetrics.functional.classification as theirs
    from torchmetrics.segmentation import MeanIoU

    from volvelle.parts.metrics.overlap import frequency_weighted_iou, mean_iou

    seen, target = _blurred(masks).long(), masks.long()
    images = _matrices(_blurred(masks), masks, k)
    options = {"num_classes": k, "validate_args": False}
    macro = float(theirs.multiclass_jaccard_index(seen, target, average="macro", **options))
    weighted = float(theirs.multiclass_jaccard_index(seen, target, average="weighted", **options))
    pairs = MeanIoU(k, input_format="index")
    pairs.update(seen, target)
    differences = (
        ("JaccardIndex(average='macro')", float(mean_iou(images)) - macro),
        ("JaccardIndex(average='weighted')", float(frequency_weighted_iou(images)) - weighted),
        ("MeanIoU (average over pairs)", float(mean_iou(images, average="pair")) - float(pairs.compute())),
    )
    found = [at_most(f"difference from torchmetrics' {name}", abs(value), 1e-6) for name, value in differences]
    return found, {"torchmetrics": metadata.version("torchmetrics")}
