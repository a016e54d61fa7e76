"""Max-unpooling: Zeiler & Fergus 2014, "Visualizing and Understanding Convolutional Networks", section 2.1; in
decoders: Badrinarayanan et al. 2017, "SegNet", section 3.

    y[index_i] = x_i,     0 elsewhere

where index_i is the place from which max-pooling took its i-th value (its "switch"), counted within a channel of the
pooled image in row-major order. So indices only mean something together with that image's size.

Shapes: input and indices (b, c, y, x), result (b, c, *output_size).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from volvelle.export import export
from volvelle.parts.convolution.atrous import Size, per_axis
from volvelle.parts.resampling.interpolation import check_image


@export("functional.max_unpool2d")
def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: tuple[int, ...] | None = None,
) -> Tensor:
    """Put the values back from where max-pooling took them, zeros elsewhere: y[index_i] = x_i.

    input (b, c, y, x); indices (b, c, y, x) int64 from `F.max_pool2d(.., return_indices=True)`; kernel size, stride and
    padding are those of the pooling. `output_size` (y', x'), or longer with the other axes first, is the size of the
    image that was pooled; by default (y - 1) stride - 2 padding + kernel, which is right only where the windows filled
    the image. Where overlapping windows took the same value twice it is put once. Raises ValueError for shapes that do
    not fit, and for a size that no such pooling turns into the input's. Zeiler & Fergus 2014, section 2.1.

    >>> x = torch.tensor([[[[1.0, 5.0, 2.0], [3.0, 4.0, 9.0]]]])
    >>> values, indices = F.max_pool2d(x, 2, return_indices=True)
    >>> max_unpool2d(values, indices, 2, output_size=(2, 3))[0, 0]
    tensor([[0., 5., 0.],
            [0., 0., 0.]])
    """
    check_image("max_unpool2d", input)
    if indices.shape != input.shape or indices.dtype != torch.int64:
        raise ValueError(
            f"max_unpool2d: indices must be int64 of the input's shape {tuple(input.shape)}, got {indices.dtype} of "
            f"shape {tuple(indices.shape)}"
        )
    kernel, padded = per_axis(kernel_size, 2), per_axis(padding, 2)
    steps = kernel if stride is None else per_axis(stride, 2)
    filled = [(n - 1) * s - 2 * p + k for n, k, s, p in zip(input.shape[2:], kernel, steps, padded, strict=True)]
    size = filled if output_size is None else list(output_size[-2:])
    if any(not n - s < asked < n + s for n, s, asked in zip(filled, steps, size, strict=True)):
        raise ValueError(
            f"max_unpool2d: output_size must be within a stride of {tuple(filled)} for input {tuple(input.shape)}, "
            f"kernel {kernel}, stride {steps} and padding {padded}, got {tuple(size)}"
        )
    return F.max_unpool2d(input, indices, kernel, steps, padded, tuple(size))
