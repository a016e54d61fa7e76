"""One learned upsampling by a whole factor, by any of the methods in use: Odena et al. 2016, "Deconvolution and
Checkerboard Artifacts"; Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?".

    method              y =                                              weight
    nearest             conv(nearest(x)), k x k on the fine grid         (d, c, k, k)
    bilinear            conv(bilinear(x)), pixels as areas               (d, c, k, k)
    bilinear_aligned    the same with aligned corners                    (d, c, k, k)
    pixel_shuffle       shuffle(conv(x)), k x k on the coarse grid       (d s², c, k, k)
    transposed          transposed convolution, s k x s k, stride s      (c, d, s k, s k)
    unpool              conv(unpool(x, indices)), k x k                  (d, c, k, k)

Each takes k² c d multiplications for a pixel of the result (of which unpooling's are mostly with zeros). Pixel_shuffle
and transposed have s² kernels for s² phases: more to learn with, and checkerboards where the phases differ. Both are
the same functions in another layout when k is odd (Shi et al. 2016, section 2). A transposed kernel of s k pixels
covers every output equally often; only the values in it can be uneven.

Shapes: input (b, c, y, x), result (b, d, s y, s x) or (b, d, *size).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.convolution.atrous import atrous_conv2d
from volvelle.parts.resampling.interpolation import check_image, resize_bilinear, resize_nearest
from volvelle.parts.resampling.pixel_shuffle import icnr_init, pixel_shuffle
from volvelle.parts.resampling.unpooling import max_unpool2d

Method = Literal["nearest", "bilinear", "bilinear_aligned", "pixel_shuffle", "transposed", "unpool"]


def _check(call: str, method: str, factor: int) -> None:
    if method not in get_args(Method):
        raise ValueError(f"{call}: method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if factor < 1:
        raise ValueError(f"{call}: factor must be at least 1, got {factor}")


@export("functional.upsample2d")
def upsample2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    factor: int = 2,
    *,
    method: Method = "bilinear",
    indices: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Upsample by a whole factor s and convolve, by the method named.

    input (b, c, y, x); weight as in the table of this file; bias (d), for pixel_shuffle (d s²), or None; `indices` are
    those of the max-pooling that unpool undoes. The result is (b, d, s y, s x), or of `size` (y', x'): interpolated to
    it, the size of the image that was pooled for unpool, and cut off at the bottom and the right by pixel_shuffle and
    transposed. Raises ValueError for an unknown method, indices without unpool or the reverse, a size out of reach, and
    shapes that do not fit.

    >>> x, kernel = torch.tensor([[[[1.0, 2.0]]]]), torch.ones(1, 1, 1, 1)
    >>> upsample2d(x, kernel, method="nearest")[0, 0]
    tensor([[1., 1., 2., 2.],
            [1., 1., 2., 2.]])
    >>> upsample2d(x, torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 2, 2), method="transposed", size=(2, 3))[0, 0]
    tensor([[1., 0., 2.],
            [0., 0., 0.]])
    """
    _check("upsample2d", method, factor)
    check_image("upsample2d", input)
    if (indices is not None) != (method == "unpool"):
        raise ValueError(f"upsample2d: indices go with the method unpool and with no other, got {method!r}")
    whole = (factor * input.shape[2], factor * input.shape[3])
    asked = whole if size is None else size
    match method:
        case "nearest":
            return atrous_conv2d(resize_nearest(input, asked), weight, bias)
        case "bilinear" | "bilinear_aligned":
            fine = resize_bilinear(input, asked, align_corners=method == "bilinear_aligned")
            return atrous_conv2d(fine, weight, bias)
        case "pixel_shuffle":
            fine = pixel_shuffle(atrous_conv2d(input, weight, bias), factor)
        case "transposed":
            fine = _transposed(input, weight, bias, factor)
        case "unpool":
            assert indices is not None
            return atrous_conv2d(max_unpool2d(input, indices, factor, output_size=asked), weight, bias)
    if asked[0] > whole[0] or asked[1] > whole[1] or min(asked) < 1:
        raise ValueError(f"upsample2d: {method} cuts its result {whole} to a size within it, got {tuple(asked)}")
    return fine[:, :, : asked[0], : asked[1]]


def _transposed(input: Tensor, weight: Tensor, bias: Tensor | None, factor: int) -> Tensor:
    """The transposed convolution that makes factor times the size (or one more), its kernel centred."""
    if weight.dim() != 4 or weight.shape[0] != input.shape[1] or any(k % factor for k in weight.shape[2:]):
        raise ValueError(
            f"upsample2d: weight must be (c, d, s k, s k) for a transposed convolution, got input "
            f"{tuple(input.shape)}, weight {tuple(weight.shape)} and factor {factor}"
        )
    # An odd rest leaves one row and column too many, behind.
    padding = [(k - factor) // 2 for k in weight.shape[2:]]
    return F.conv_transpose2d(input, weight, bias, factor, padding)


@export("nn.Upsample2d", twin=upsample2d, stable=True)
class Upsample2d(nn.Module):
    """`upsample2d` with its weight: c to d channels and s times the size, the same call for every method.

    `factor` is s, `kernel_size` k (on the grid that the method convolves on; 2 and "transposed" is the 4 x 4 kernel of
    many generators). Parameters: k² c d, for pixel_shuffle and transposed s² times as many, and the bias. Weights start
    uniform in ±1/(k √c), as nn.Conv2d's do; those of pixel_shuffle, and its biases, by ICNR: free of checkerboards.

    >>> up = Upsample2d(8, 3, method="pixel_shuffle")
    >>> up(torch.zeros(2, 8, 5, 7)).shape, up(torch.zeros(2, 8, 5, 7), size=(9, 13)).shape
    (torch.Size([2, 3, 10, 14]), torch.Size([2, 3, 9, 13]))
    >>> values, indices = F.max_pool2d(torch.zeros(2, 8, 9, 13), 2, return_indices=True)
    >>> Upsample2d(8, 3, method="unpool")(values, indices, size=(9, 13)).shape
    torch.Size([2, 3, 9, 13])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        factor: int = 2,
        *,
        method: Method = "bilinear",
        kernel_size: int = 3,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check("Upsample2d", method, factor)
        if min(in_channels, out_channels, kernel_size) < 1:
            raise ValueError(
                f"Upsample2d: channels and kernel_size must be at least 1, got {in_channels}, {out_channels} and "
                f"{kernel_size}"
            )
        self.factor, self.kernel_size = factor, kernel_size
        self.method: Method = method
        phases = factor**2 if method == "pixel_shuffle" else 1
        if method == "transposed":
            shape = (in_channels, out_channels, factor * kernel_size, factor * kernel_size)
        else:
            shape = (phases * out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(phases * out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases from ±1/(k √c), for pixel_shuffle alike in all phases."""
        in_channels = self.weight.shape[0 if self.method == "transposed" else 1]
        bound = 1 / (self.kernel_size * math.sqrt(in_channels))
        phases = self.factor if self.method == "pixel_shuffle" else 1
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                icnr_init(parameter, phases, lambda tensor: nn.init.uniform_(tensor, -bound, bound))

    def forward(self, input: Tensor, indices: Tensor | None = None, *, size: tuple[int, int] | None = None) -> Tensor:
        """Map (b, c, y, x) to (b, d, s y, s x) or (b, d, *size); `indices` for the method unpool."""
        return upsample2d(input, self.weight, self.bias, self.factor, method=self.method, indices=indices, size=size)

    def extra_repr(self) -> str:
        """The numbers shown by print(model)."""
        channels = self.weight.shape[:2] if self.method == "transposed" else self.weight.shape[1::-1]
        out = channels[1] // (self.factor**2 if self.method == "pixel_shuffle" else 1)
        return f"{channels[0]}, {out}, factor={self.factor}, method={self.method!r}, kernel_size={self.kernel_size}"
