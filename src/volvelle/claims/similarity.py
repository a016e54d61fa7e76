"""Structural similarity: pictures with one squared error that the eye, and SSIM, tell apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

CLAIM = Claim(
    title="Structural similarity (SSIM) beside the squared error (PSNR)",
    family="metrics",
    paper=Paper(
        "Wang et al.",
        2004,
        "Image Quality Assessment: From Error Visibility to Structural Similarity",
        "sections I and II, figure 2",
        "https://doi.org/10.1109/TIP.2003.819861",
    ),
    sentence="distorted pictures with the same mean squared error can have very different quality: a shift of the mean "
    "or a stretched contrast keeps the structure, blur, blocks and noise do not, and SSIM tells them apart",
    measured_by="garments on textures, in grey: each distortion of the paper's figure brought to its squared error "
    "(210 of 255²), pictures one by one; PSNR and SSIM of each; scikit-image's SSIM on the same pictures",
    summary="Two figures of how far a picture is from what it should be: PSNR follows squared errors, SSIM local "
    "brightness, contrast and structure.",
    summary_zh="衡量图片与目标差距的两个指标：PSNR 只看平方误差，SSIM 比较局部亮度、对比度与结构。",
    seconds={"quick": 40, "full": 120},
    parts=("functional.structural_similarity", "functional.peak_signal_noise_ratio"),
)

ERROR = 210 / 255**2
"""Mean squared error of every distorted picture."""
KEPT = ("mean shifted", "contrast stretched")
"""Distortions that keep the structure."""


def measure(budget: Budget) -> Measurement:
    """8 pictures (full: 60)."""
    from volvelle.errors import VolvelleError
    from volvelle.parts.metrics import psnr, ssim

    try:
        pictures = _pictures(8 if budget == "quick" else 60)
    except VolvelleError as error:
        return Measurement(unmeasurable=f"no garments to draw: {error}")
    similar: dict[str, float] = {}
    worst, findings = 0.0, []
    for name, distort in distortions().items():
        distorted = equally_wrong(pictures, distort)
        decibels = psnr.peak_signal_noise_ratio(distorted, pictures, 1.0)
        values = ssim.structural_similarity(distorted, pictures, 1.0)
        back = ssim.structural_similarity(pictures, distorted, 1.0)
        similar[name] = float(values.mean())
        worst = max(worst, float((values - back).abs().max()))
        spread = (float(values.min()), float(values.max()))
        findings += [
            Finding(
                f"{name}: PSNR", float(decibels.mean()), "dB", spread=(float(decibels.min()), float(decibels.max()))
            ),
            Finding(f"{name}: SSIM", similar[name], spread=spread),
        ]
    decibels = [finding.value for finding in findings if finding.what.endswith("PSNR")]
    others = [value for name, value in similar.items() if name not in KEPT]
    same = ssim.structural_similarity(pictures, pictures, 1.0)
    findings += [
        at_most("PSNR of all distortions, largest difference", max(decibels) - min(decibels), 0.01, "dB"),  # type: ignore[operator]
        at_least(
            "least SSIM of those that keep the structure, minus the largest of the others",
            min(similar[name] for name in KEPT) - max(others),
            0.0,
        ),
        at_least("SSIM, most minus least, at one squared error", max(similar.values()) - min(similar.values()), 0.2),
        at_most("SSIM of a picture with itself, distance from 1", float((same - 1).abs().max()), 1e-12),
        at_most("SSIM with its arguments exchanged, largest difference", worst, 1e-12),
    ]
    peer, versions = _peer(pictures)
    setting = {"pictures": len(pictures), "size": "128 x 128, grey in 0.25 .. 0.75", "error": ERROR, "dtype": "fp64"}
    notes = ["pictures in 0.25 .. 0.75, so that no distortion is cut off; blocks of the mean stand in for JPEG's"]
    if not versions:
        notes.append("scikit-image is not installed here: not compared")
    return Measurement([*findings, *peer], peers=versions, setting=setting, notes=notes)


def _pictures(count: int) -> Tensor:
    """Scenes in grey, (b, 1, y, x), fp64."""
    import numpy as np
    import torch

    from volvelle.data.scenes import Scenes

    scenes = Scenes(count, size=128, seed=0, part="val")
    found = torch.from_numpy(np.stack([np.asarray(scenes.scene(i).image) for i in range(count)])).double()
    grey = found.mean(-1) if found.shape[-1] == 3 else found.mean(1)
    low, high = grey.amin((1, 2), keepdim=True), grey.amax((1, 2), keepdim=True)
    return (0.25 + 0.5 * (grey - low) / (high - low))[:, None]


def distortions() -> dict[str, Callable[[Tensor, float], Tensor]]:
    """By name: the distorted picture (1, 1, y, x) at a strength from 0 on."""
    import torch
    import torch.nn.functional as F

    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 128, 128, generator=draw, dtype=torch.float64)
    places = torch.rand(1, 1, 128, 128, generator=draw, dtype=torch.float64)

    def towards(x: Tensor, smooth: Tensor, strength: float) -> Tensor:
        return x + strength * (smooth - x)

    def blurred(x: Tensor, strength: float) -> Tensor:
        padded = F.pad(x, (6, 6, 6, 6), mode="reflect")
        return towards(x, F.avg_pool2d(padded, 13, 1), strength)

    def blocks(x: Tensor, strength: float) -> Tensor:
        return towards(x, F.avg_pool2d(x, 8).repeat_interleave(8, 2).repeat_interleave(8, 3), strength)

    return {
        "mean shifted": lambda x, strength: x + strength,
        "contrast stretched": lambda x, strength: x + strength * (x - x.mean()),
        "noise": lambda x, strength: x + strength * noise,
        "salt and pepper": lambda x, strength: towards(
            x, torch.where(places < 0.02, 0.0, torch.where(places > 0.98, 1.0, x)), strength
        ),
        "blurred": blurred,
        "blocks": blocks,
    }


def equally_wrong(pictures: Tensor, distort: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Every picture at the strength at which its mean squared error is `ERROR`; it grows with the strength squared."""
    import torch

    found = []
    for x in pictures[:, None]:
        strength = (ERROR / float((distort(x, 1.0) - x).square().mean())) ** 0.5
        found.append(distort(x, strength))
    return torch.cat(found)


def _peer(pictures: Tensor) -> tuple[list[Finding], dict[str, str]]:
    """scikit-image's SSIM, where it is installed, with the paper's window."""
    from importlib import metadata
    from importlib.util import find_spec

    if find_spec("skimage") is None:
        return [], {}
    from skimage.metrics import structural_similarity

    from volvelle.parts.metrics import ssim

    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    distorted = equally_wrong(pictures, distortions()["noise"])
    ours = ssim.structural_similarity(distorted, pictures, 1.0)
    apart = 0.0
    for x, y, value in zip(pictures, distorted, ours.tolist(), strict=True):
        theirs: Any = structural_similarity(x[0].numpy(), y[0].numpy(), **options)
        apart = max(apart, abs(value - float(theirs)))
    found = at_most("largest difference from scikit-image's SSIM", apart, 1e-9)
    return [found], {"scikit-image": metadata.version("scikit-image")}
