"""The nearest code of every vector, the same in every number format: argmin_k |z - e_k|², the first one of equals.

|z - e|² = |z|² + |e|² - 2 z·e. The first term does not depend on k, and where it is large it swallows what does: with
codes that are small beside the vectors, as they are at the start of a training, sums in bf16 give every vector the same
code. So it is left out, ½|e|² - z·e is computed in fp32, and where the error of these sums could turn the order, the
candidates are compared again in fp64 by their differences.

Shapes: vectors z (..., d), codebook e (K, d), codes (...) int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from volvelle.export import export

SCORES = 1 << 24
"""Scores held at a time, 64 MB of fp32."""
_UNITS = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}
"""The rounding of a product's factors, by torch.get_float32_matmul_precision()."""


@export("functional.nearest_code")
def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The number of the nearest code, argmin_k |z - e_k|²; of codes at the same distance the first.

    vectors (..., d), codebook (K, d), both floating, of any formats; the result is int64 (...). What is computed in
    fp64 from the numbers given is what every format gets, under autocast too. A vector with NaN gets an arbitrary code.
    Raises ValueError for widths that differ and an empty codebook, TypeError for integers.

    van den Oord et al. 2017, "Neural Discrete Representation Learning", equation 1.

    >>> nearest_code(torch.tensor([[0.9, 0.2], [0.0, -3.0]]), torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    tensor([1, 0])
    """
    if codebook.ndim != 2 or not len(codebook) or vectors.shape[-1:] != codebook.shape[1:]:
        raise ValueError(
            f"nearest_code: vectors (..., d) and codebook (K, d) with K >= 1 are wanted, got {tuple(vectors.shape)} "
            f"and {tuple(codebook.shape)}"
        )
    if not (vectors.is_floating_point() and codebook.is_floating_point()):
        raise TypeError(f"nearest_code: floating-point tensors are wanted, got {vectors.dtype} and {codebook.dtype}")
    found: Tensor = _nearest(vectors.detach().reshape(-1, codebook.shape[1]), codebook.detach())
    return found.view(vectors.shape[:-1])


@torch.library.custom_op("volvelle::nearest_code", mutates_args=())
def _nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Opaque to compilers: how much is compared again depends on the values."""
    exact = torch.promote_types(vectors.dtype, codebook.dtype) == torch.float64
    dtype = torch.float64 if exact else torch.float32
    z, e = vectors.to(dtype), codebook.to(dtype)
    codes = torch.empty(len(z), dtype=torch.long, device=z.device)
    rows = max(1, SCORES // len(e))
    with torch.autocast(z.device.type, enabled=False):
        half = (e.double().square().sum(1) / 2).to(dtype)
        for start in range(0, len(z), rows):
            codes[start : start + rows] = _of_rows(z[start : start + rows], e, half)
    return codes


@_nearest.register_fake
def _(vectors: Tensor, codebook: Tensor) -> Tensor:
    return vectors.new_empty(vectors.shape[0], dtype=torch.long)


def _of_rows(z: Tensor, e: Tensor, half: Tensor) -> Tensor:
    """Codes of z (n, d): by the scores where they are certain, by fp64 differences where they are not."""
    scores = torch.addmm(half, z, e.mT, alpha=-1)  # (n, K)
    best, codes = scores.min(1)
    # A sum of d products of rounded factors is off by at most (d + 2) units of |z||e|; both of two scores may be.
    unit = 2.0**-53 if z.dtype == torch.float64 else _UNITS[torch.get_float32_matmul_precision()]
    reach = z.norm(dim=1) * e.norm(dim=1).max() + half.max() + best.abs()
    close = scores <= (best + 2 * (z.shape[1] + 3) * unit * reach)[:, None]
    counts = close.sum(1)
    unsure = (counts > 1).nonzero()[:, 0]
    if len(unsure):
        width = int(counts.max())
        for some in unsure.split(max(1, SCORES // 4 // (width * z.shape[1]))):
            candidates = scores[some].topk(width, largest=False, sorted=False).indices.sort(1).values
            apart = e[candidates].double() - z[some].double()[:, None]
            nearest = apart.square().sum(-1).argmin(1, keepdim=True)
            codes[some] = candidates.gather(1, nearest)[:, 0]
    return codes
