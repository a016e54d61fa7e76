"""Sub-pixel convolution: Shi et al. 2016, "Real-Time Single Image and Video Super-Resolution Using an Efficient
Sub-Pixel Convolutional Neural Network", section 3.2; ICNR: Aitken et al. 2017, "Checkerboard artifact free sub-pixel
convolution", section 3.

A convolution makes d s² channels, and the shuffle lays those of output channel n out as the s x s pixels of a block:

    y[n, s i + p, s j + q] = x[n s² + s p + q, i, j]

Kernels drawn one by one give the s² phases different responses, even to a constant image: a checkerboard. ICNR
(initialised to convolution, nearest-neighbour resize) draws one kernel for each output channel and gives it to all of
its phases, so that the layer starts as a convolution followed by nearest upsampling and can still learn all the rest.

Shapes: x (b, d s², y, x), y (b, d, s y, s x); weight (d s², c / groups, K, K).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.resampling.interpolation import check_image


@export("functional.pixel_shuffle")
def pixel_shuffle(input: Tensor, upscale_factor: int) -> Tensor:
    """Lay s² channels out as blocks of s x s pixels: y[n, s i + p, s j + q] = x[n s² + s p + q, i, j].

    input (b, d s², y, x); the result is (b, d, s y, s x). Raises ValueError when s is below 1 or s² does not divide the
    channels. Shi et al. 2016,
    section 3.2, with the order of channels that torch has.

    >>> pixel_shuffle(torch.arange(4.0).view(1, 4, 1, 1), 2)[0, 0]
    tensor([[0., 1.],
            [2., 3.]])
    """
    check_image("pixel_shuffle", input)
    if upscale_factor < 1 or input.shape[1] % upscale_factor**2:
        raise ValueError(
            f"pixel_shuffle: the channels must be a multiple of the squared factor, got input {tuple(input.shape)} and "
            f"upscale_factor {upscale_factor}"
        )
    return F.pixel_shuffle(input, upscale_factor)


@export("functional.icnr_init", stable=True)
@torch.no_grad()
def icnr_init(
    weight: Tensor,
    upscale_factor: int = 2,
    init: Callable[[Tensor], object] = nn.init.kaiming_normal_,
    *,
    groups: int = 1,
) -> Tensor:
    """Fill a weight in place so that pixel_shuffle(conv(x)) starts as nearest upsampling of a convolution; return it.

    `weight` is (d s², c / groups, K, K) of the convolution before a shuffle by s = `upscale_factor`, or its bias
    (d s²). `init` fills a tensor (d, c / groups, K, K) in place or returns another, as those of torch.nn.init do; each
    of its kernels goes to the s² phases of one output channel. Half precision is drawn in fp32. Raises ValueError when
    s² does not divide the channels, or when `groups` cuts an output channel in two, whose phases then cannot be equal.
    Aitken et al. 2017, section 3.

    >>> weight = icnr_init(torch.empty(3 * 4, 5, 3, 3), 2)
    >>> bool((weight[0] == weight[3]).all()), bool((weight[3] == weight[4]).any())
    (True, False)
    """
    phases = upscale_factor**2
    if upscale_factor < 1 or weight.ndim < 1 or weight.shape[0] % phases:
        raise ValueError(
            f"icnr_init: the first axis must be a multiple of the squared factor, got weight {tuple(weight.shape)} and "
            f"upscale_factor {upscale_factor}"
        )
    outputs = weight.shape[0] // phases
    if groups < 1 or outputs % groups:
        raise ValueError(
            f"icnr_init: groups must divide the {outputs} channels that the shuffle makes, or the phases of one of "
            f"them read different inputs, got groups {groups}"
        )
    dtype = torch.promote_types(weight.dtype, torch.float32)
    kernels = torch.empty(outputs, *weight.shape[1:], dtype=dtype, device=weight.device)
    made = init(kernels)
    kernels = made if isinstance(made, Tensor) else kernels
    return weight.copy_(kernels.repeat_interleave(phases, dim=0))
