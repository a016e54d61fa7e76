"""Ways to stretch RoPE beyond the trained context: each turns (dim, base) into θ_i, and may scale attention.

Plain RoPE has θ_i = base^(-2i/dim), i = 0 .. dim/2 - 1 (Su et al. 2021, section 3.2.2). All arithmetic is fp64.
`length` is the length of the text so far (largest position + 1), for the two scalings that depend on it.
`attention_factor` multiplies cos and sin, hence q·k by its square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def plain_frequencies(dim: int, base: float | Tensor) -> Tensor:
    """Return base^(-2i/dim) as fp64 of shape (dim / 2,), on the CPU unless `base` is a tensor elsewhere."""
    device = base.device if isinstance(base, Tensor) else torch.device("cpu")
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    return torch.pow(base, -exponent)


class Scaling(Protocol):
    """One way to stretch the frequencies."""

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by."""
        ...

    @property
    def needs_length(self) -> bool:
        """Whether `frequencies` depends on the length of the text."""
        ...

    def frequencies(self, dim: int, base: float, length: Tensor | None = None) -> Tensor:
        """Return fp64 frequencies of shape (dim / 2,)."""
        ...


@dataclass(frozen=True)
class LinearScaling:
    """θ_i / factor: positions squeezed into the trained range (Chen et al. 2023, "position interpolation").

    >>> LinearScaling(4.0).frequencies(4, 10000.0)
    tensor([0.2500, 0.0025], dtype=torch.float64)
    """

    factor: float
    attention_factor = 1.0
    needs_length = False

    def frequencies(self, dim: int, base: float, length: Tensor | None = None) -> Tensor:
        """Return θ_i / factor."""
        return plain_frequencies(dim, base) / self.factor


@dataclass(frozen=True)
class ProportionalScaling:
    """θ_i = base^(-2i/dim) for the first `fraction` of the pairs and 0 (no turn) for the rest.

    Not partial rotary: there the exponent runs over the rotated width, here over the whole head.

    >>> ProportionalScaling(0.5).frequencies(8, 10000.0)
    tensor([1.0000, 0.1000, 0.0000, 0.0000], dtype=torch.float64)
    """

    fraction: float
    factor: float = 1.0
    attention_factor = 1.0
    needs_length = False

    def frequencies(self, dim: int, base: float, length: Tensor | None = None) -> Tensor:
        """Return the frequencies with a tail of zeros."""
        theta = plain_frequencies(dim, base) / self.factor
        theta[int(self.fraction * dim // 2) :] = 0
        return theta


@dataclass(frozen=True)
class NTKScaling:
    """base' = base * factor^(dim / (dim - 2)): the slowest pair is stretched by `factor`, the fastest stays.

    "NTK-aware" interpolation (bloc97 2023; Peng et al. 2023, section 3.1). Each pair between is stretched by
    factor^(2i / (dim - 2)).

    >>> NTKScaling(8.0).frequencies(8, 10000.0)
    tensor([1.0000e+00, 5.0000e-02, 2.5000e-03, 1.2500e-04], dtype=torch.float64)
    """

    factor: float
    attention_factor = 1.0
    needs_length = False

    def frequencies(self, dim: int, base: float, length: Tensor | None = None) -> Tensor:
        """Return the frequencies of the larger base."""
        return plain_frequencies(dim, base * self.factor ** (dim / (dim - 2)))


@dataclass(frozen=True)
class DynamicNTKScaling:
    """base' = base * (factor L / L_0 - (factor - 1))^(dim / (dim - 2)) for a text of length L beyond L_0.

    The base grows with the text, so keys cached earlier were turned with other frequencies; the error is the
    method's own (and the same in transformers).

    >>> import torch
    >>> short, long = torch.tensor(10), torch.tensor(4096)
    >>> scaling = DynamicNTKScaling(2.0, original_context=2048)
    >>> scaling.frequencies(8, 10000.0, short)
    tensor([1.0000, 0.1000, 0.0100, 0.0010], dtype=torch.float64)
    >>> scaling.frequencies(8, 10000.0, long)
    tensor([1.0000e+00, 6.9336e-02, 4.8075e-03, 3.3333e-04], dtype=torch.float64)
    """

    factor: float
    original_context: int
    attention_factor = 1.0
    needs_length = True

    def frequencies(self, dim: int, base: float, length: Tensor | None = None) -> Tensor:
        """Return the frequencies for a text of this length; None means within the trained context."""
        if length is None:
            return plain_frequencies(dim, base)
        stretch = self.factor * length.double().clamp(min=self.original_context) / self.original_context
        return plain_frequencies(dim, base * (stretch - (self.factor - 1)) ** (dim / (dim - 2)))


@dataclass(frozen=True)
class YaRNScaling:
    """Interpolate slow frequencies, keep fast ones, ramp between (Peng et al. 2023, "NTK-by-parts", equations 17-21).

    A pair that turns more than `beta_fast` times within the trained context keeps θ_i; below `beta_slow` turns it
    becomes θ_i / factor. Attention is scaled by 0.1 ln(factor) + 1 (equation 22), or by the ratio of the two `mscale`
    forms (DeepSeek), or by `attention_factor` when given.

    >>> round(YaRNScaling(4.0, original_context=2048).attention_factor, 4)
    1.1386
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    given_attention_factor: float | None = None
    needs_length = False

    def _mscale(self, m: float) -> float:
        return 0.1 * m * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def attention_factor(self) -> float:
        """The paper's sqrt(1/t)."""
        if self.given_attention_factor is not None:
            return self.given_attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def frequencies(self, dim: int, base: float, length: Tensor | None = None) -> Tensor:
        """Return the ramp between θ_i and θ_i / factor."""

        def pair_of(turns: float) -> float:
            return dim * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low if high != low else 0.001
        ramp = ((torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / width).clamp(0, 1)
        theta = plain_frequencies(dim, base)
        return theta * (1 - ramp) + theta / self.factor * ramp


@dataclass(frozen=True)
class LongRoPEScaling:
    """θ_i / λ_i with searched factors λ, one set up to the trained context and one beyond (Ding et al. 2024).

    >>> scaling = LongRoPEScaling((1.0, 1.0), (1.0, 4.0), original_context=4096, factor=32.0)
    >>> scaling.frequencies(4, 10000.0), scaling.frequencies(4, 10000.0, torch.tensor(5000))
    (tensor([1.0000, 0.0100], dtype=torch.float64), tensor([1.0000, 0.0025], dtype=torch.float64))
    """

    short_factor: Sequence[float]
    long_factor: Sequence[float]
    original_context: int
    factor: float = 1.0
    given_attention_factor: float | None = None
    needs_length = True

    @property
    def attention_factor(self) -> float:
        """sqrt(1 + ln(factor) / ln(original context)), unless given."""
        if self.given_attention_factor is not None:
            return self.given_attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_context))

    def frequencies(self, dim: int, base: float, length: Tensor | None = None) -> Tensor:
        """Return the frequencies for a text of this length; None means within the trained context."""
        for name, factors in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            if len(factors) != dim // 2:
                raise ValueError(f"LongRoPEScaling: {name} must hold {dim // 2} factors, got {len(factors)}")
        device = torch.device("cpu") if length is None else length.device
        theta = plain_frequencies(dim, base).to(device)
        short = theta / torch.tensor(self.short_factor, dtype=torch.float64, device=device)
        if length is None:
            return short
        long = theta / torch.tensor(self.long_factor, dtype=torch.float64, device=device)
        return torch.where(length > self.original_context, long, short)


@dataclass(frozen=True)
class Llama3Scaling:
    """Keep wavelengths below L_0 / high, divide those above L_0 / low by `factor`, blend between (Llama 3.1).

    >>> Llama3Scaling(8.0, original_context=8192).frequencies(4, 500000.0)
    tensor([1.0000e+00, 5.2485e-04], dtype=torch.float64)
    """

    factor: float
    original_context: int
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    attention_factor = 1.0
    needs_length = False

    def frequencies(self, dim: int, base: float, length: Tensor | None = None) -> Tensor:
        """Return the blend of θ_i and θ_i / factor."""
        theta = plain_frequencies(dim, base)
        turns = self.original_context * theta / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return theta * keep + theta / self.factor * (1 - keep)
