"""Structural similarity: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity",
equations 6 to 8 and 13.

    SSIM = mean over pixels of  (2 μ_x μ_y + C₁) (2 σ_xy + C₂) / ((μ_x² + μ_y² + C₁) (σ_x² + σ_y² + C₂))

with means, variances and covariance under an 11 x 11 Gaussian window of standard deviation 1.5 around each pixel, and
C_i = (K_i range)². 1 for equal pictures; it compares local contrast and structure where a squared error compares
pixels. Only windows that lie inside the picture count.

Shapes: pictures (b, c, y, x); channels count alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from volvelle.export import export


@export("functional.structural_similarity", aliases=("functional.ssim",))
def structural_similarity(
    preds: Tensor,
    target: Tensor,
    data_range: float,
    *,
    window: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Tensor:
    """Return the mean SSIM of each picture, (b), at most 1; differentiable.

    preds and target (b, c, y, x), at least `window` pixels high and wide, whose values span `data_range` (2 for
    [-1, 1]). Variances are those of the window's weights, without the factor n / (n - 1). Computed in fp32 or wider,
    integers in fp64. Raises ValueError for unequal shapes, smaller pictures and an even window. Wang et al. 2004.

    >>> x = torch.rand(2, 1, 16, 16)
    >>> structural_similarity(x, x, 1.0)
    tensor([1., 1.])
    """
    if preds.shape != target.shape or preds.ndim != 4 or window < 1 or window % 2 == 0 or not data_range > 0:
        raise ValueError(
            "structural_similarity: preds and target must be (b, c, y, x) of equal shape, window odd, data_range > 0, "
            f"got {tuple(preds.shape)}, {tuple(target.shape)}, {window} and {data_range}"
        )
    if min(preds.shape[2:]) < window:
        raise ValueError(
            f"structural_similarity: pictures must be at least {window} pixels high and wide, got {tuple(preds.shape)}"
        )
    found = torch.promote_types(preds.dtype, target.dtype)
    wide = torch.promote_types(found, torch.float32) if found.is_floating_point else torch.float64
    x, y = preds.to(wide), target.to(wide)
    with torch.autocast(x.device.type, enabled=False):
        b, c = x.shape[:2]
        # About the middle of the values, so that fp32 does not lose small variances on large means.
        middle = x.mean((2, 3), keepdim=True).detach()
        u, v = x - middle, y - middle
        five = torch.cat((u, v, u * u, v * v, u * v)).flatten(0, 1)[:, None]
        mean_u, mean_v, uu, vv, uv = _blurred(five, window, sigma).unflatten(0, (5, b, c))[:, :, :, 0]
        mean_x, mean_y = mean_u + middle, mean_v + middle
        var_x, var_y, cov = uu - mean_u**2, vv - mean_v**2, uv - mean_u * mean_v
        one, two = (k1 * data_range) ** 2, (k2 * data_range) ** 2
        light = (2 * mean_x * mean_y + one) / (mean_x**2 + mean_y**2 + one)
        return (light * (2 * cov + two) / (var_x + var_y + two)).flatten(1).mean(1)


def _blurred(x: Tensor, window: int, sigma: float) -> Tensor:
    """Gaussian means around each pixel of (n, 1, y, x) whose window lies inside."""
    at = torch.arange(window, dtype=x.dtype, device=x.device) - window // 2
    weights = (-(at**2) / (2 * sigma**2)).exp()
    weights = (weights / weights.sum())[None, None]
    return F.conv2d(F.conv2d(x, weights[..., None]), weights[:, :, None])
