"""Peak signal-to-noise ratio: how far pictures are from what they should be, in decibels.

    PSNR = 10 log₁₀(range² / mean of (x - y)²)

One picture's error, or the mean error of many, on a logarithmic scale: 6 dB more is half the error. It says nothing
about where the error is; blur costs little.
"""

from __future__ import annotations

import torch
from torch import Tensor

from volvelle.export import export


@export("functional.peak_signal_noise_ratio", aliases=("functional.psnr",))
def peak_signal_noise_ratio(preds: Tensor, target: Tensor, data_range: float) -> Tensor:
    """Return the PSNR in dB of each picture, (b), for preds and target (b, …) whose values span `data_range`.

    `data_range` is 2 for pixels in [-1, 1], 1 for [0, 1], 255 for bytes. Equal pictures have infinity. Computed in fp32
    or wider, integers in fp64. The mean over a set is commonly that of these; the PSNR of the mean error is another,
    smaller figure. Raises ValueError for unequal or empty shapes and a range that is not above 0.

    >>> error = torch.tensor([0.1, 1.0])[:, None].expand(2, 9)
    >>> peak_signal_noise_ratio(torch.zeros(2, 9), error, 1)
    tensor([20.,  0.])
    """
    if preds.shape != target.shape or preds.ndim < 2 or not preds.numel() or not data_range > 0:
        raise ValueError(
            "peak_signal_noise_ratio: preds and target must be batches (b, …) of equal shape and data_range > 0, got "
            f"{tuple(preds.shape)}, {tuple(target.shape)} and {data_range}"
        )
    found = torch.promote_types(preds.dtype, target.dtype)
    wide = torch.promote_types(found, torch.float32) if found.is_floating_point else torch.float64
    error = (preds.to(wide) - target.to(wide)).flatten(1).square().mean(1)
    return 10 * torch.log10(data_range**2 / error)
