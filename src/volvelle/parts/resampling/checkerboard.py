"""A measure of checkerboard artefacts: Odena et al. 2016, "Deconvolution and Checkerboard Artifacts", turned into a
number.

An upsampling by s that treats the s x s phases of its lattice unequally leaves a pattern that repeats every s pixels,
at the frequencies (k / s, l / s) with k, l = 0 .. s - 1, not both 0. By Parseval's theorem the energy at exactly these
is the spread of the phases' means, so that

    checkerboard = Σ_pq (m_pq - m)² / s²  /  mean of (x - m)²,      m_pq = mean of x[s i + p, s j + q], m = mean of x

the share of a map's variance that its lattice explains: 0 for none, 1 where there is nothing else. Neither scale nor
offset change it. Nearest upsampling has 0 for any content, for every value fills all phases once; a ramp over m blocks
has less than 1 / m², since its slope is within the blocks as well; white noise has (s² - 1) / (pixels - 1).

Shapes: x (.., y, x), result (..).
"""

from __future__ import annotations

import torch
from torch import Tensor

from volvelle.export import export


@export("functional.checkerboard")
def checkerboard(x: Tensor, factor: int = 2) -> Tensor:
    """Return the share of each map's variance that lies at the frequencies of an upsampling lattice, from 0 to 1.

    x (.., y, x) floating, of at least factor x factor pixels; what is beyond whole blocks of factor x factor is left
    out. The result is (..), computed in fp32 or wider, and differentiable. A map without variance beyond its rounding
    has 0. Raises ValueError for a factor below 2 and for smaller maps. Odena et al. 2016.

    >>> board = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(4, 4)
    >>> checkerboard(board), checkerboard(board + torch.arange(8.0)) < 0.1
    (tensor(1.), tensor(True))
    """
    if factor < 2 or x.dim() < 2 or min(x.shape[-2:]) < factor:
        raise ValueError(
            f"checkerboard: x must be (.., y, x) of at least factor x factor pixels with factor >= 2, got "
            f"{tuple(x.shape)} and factor {factor}"
        )
    high, wide = (n // factor for n in x.shape[-2:])
    maps = x[..., : high * factor, : wide * factor].to(torch.promote_types(x.dtype, torch.float32))
    deviations = maps - maps.mean((-2, -1), keepdim=True)
    phases = deviations.unflatten(-1, (wide, factor)).unflatten(-3, (high, factor)).mean((-4, -2))  # (.., s, s)
    lattice, total = phases.square().mean((-2, -1)), deviations.square().mean((-2, -1))
    # Rounding repeats with the lattice as well; a constant map must not become a perfect checkerboard.
    rounding = maps.detach().square().mean((-2, -1)) * (4 * torch.finfo(x.dtype).eps) ** 2
    some = ~(total <= rounding)  # NaN stays NaN
    return torch.where(some, lattice / torch.where(some, total, 1), 0)
