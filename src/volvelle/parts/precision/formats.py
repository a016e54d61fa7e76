"""The number formats of training: bits of fp64, fp32, fp16 and bf16, their ranges, and the step at a value.

A binary floating-point number of e exponent bits and f fraction bits has the layout sign (1) | exponent (e) |
fraction (f). With E the exponent field, F the fraction field and b = 2^(e-1) - 1 (IEEE 754-2019, section 3.4):

    E = 0            (-1)^s 2^(1-b) F / 2^f           subnormal, and zero
    0 < E < 2^e - 1  (-1)^s 2^(E-b) (1 + F / 2^f)     normal
    E = 2^e - 1      infinity when F = 0, else NaN

bf16 is fp32 without its lower 16 bits: fp32's range, but steps of 2^-7 at 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from volvelle.export import export


@dataclass(frozen=True)
class NumberFormat:
    """A binary floating-point format; every property follows from its two widths.

    >>> f = NumberFormat("fp16", torch.float16, exponent_bits=5, fraction_bits=10)
    >>> f.bits, f.largest, f.smallest_normal, f.smallest_subnormal
    (16, 65504.0, 6.103515625e-05, 5.960464477539063e-08)
    """

    name: str
    dtype: torch.dtype
    exponent_bits: int
    fraction_bits: int

    @property
    def bits(self) -> int:
        """All bits: sign, exponent, fraction."""
        return 1 + self.exponent_bits + self.fraction_bits

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent field: 2^(e-1) - 1."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def largest(self) -> float:
        """The largest finite number: (2 - 2^-f) 2^b."""
        return math.ldexp(2.0 - 2.0**-self.fraction_bits, self.bias)

    @property
    def smallest_normal(self) -> float:
        """The smallest number with all its f bits of precision: 2^(1-b)."""
        return math.ldexp(1.0, 1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest number above zero: 2^(1-b-f)."""
        return math.ldexp(1.0, 1 - self.bias - self.fraction_bits)

    @property
    def epsilon(self) -> float:
        """The step at 1: 2^-f."""
        return 2.0**-self.fraction_bits

    def step(self, x: float) -> float:
        """Distance from |x| to the next larger number of this format: 2^(floor(log2 |x|) - f), at least the subnormal.

        >>> FP16.step(1024.0), FP16.step(1e-6) == FP16.smallest_subnormal
        (1.0, True)
        """
        if not math.isfinite(x):
            raise ValueError(f"NumberFormat.step: x must be finite, got {x}")
        exponent = math.frexp(x)[1] - 1 if x else 1 - self.bias
        return math.ldexp(1.0, max(exponent, 1 - self.bias) - self.fraction_bits)

    def decode(self, pattern: int) -> float:
        """The number that a bit pattern stands for, by the formula at the head of this file.

        >>> BF16.decode(0b0_01111111_0000001)
        1.0078125
        """
        if not 0 <= pattern < 2**self.bits:
            raise ValueError(f"NumberFormat.decode: {self.name} has patterns of {self.bits} bits, got {pattern:#x}")
        top, f = 2**self.exponent_bits - 1, self.fraction_bits
        fraction, exponent = pattern % 2**f, (pattern >> f) & top
        sign = -1.0 if pattern >> (self.bits - 1) else 1.0
        if exponent == top:
            return sign * math.inf if not fraction else math.nan
        if exponent == 0:
            return sign * math.ldexp(fraction, 1 - self.bias - f)
        return sign * math.ldexp(2**f + fraction, exponent - self.bias - f)

    def layout(self, x: float) -> str:
        """The bits of x, rounded to this format: "sign exponent fraction".

        >>> FP16.layout(-2.0)
        '1 10000 0000000000'
        """
        whole = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[self.bits]
        pattern = int(torch.tensor(x, dtype=torch.float64).to(self.dtype).view(whole)) % 2**self.bits
        text = f"{pattern:0{self.bits}b}"
        return f"{text[0]} {text[1 : 1 + self.exponent_bits]} {text[1 + self.exponent_bits :]}"


FP64 = NumberFormat("fp64", torch.float64, exponent_bits=11, fraction_bits=52)
FP32 = NumberFormat("fp32", torch.float32, exponent_bits=8, fraction_bits=23)
FP16 = NumberFormat("fp16", torch.float16, exponent_bits=5, fraction_bits=10)
BF16 = NumberFormat("bf16", torch.bfloat16, exponent_bits=8, fraction_bits=7)
FORMATS = (FP64, FP32, FP16, BF16)


@export("functional.number_format")
def number_format(dtype: torch.dtype) -> NumberFormat:
    """The format of a torch dtype: its bits, range, and the step at any value.

    Raises ValueError for a dtype other than float64, float32, float16 and bfloat16. IEEE 754-2019, section 3.4.

    >>> number_format(torch.bfloat16).step(256.0)
    2.0
    """
    for known in FORMATS:
        if known.dtype == dtype:
            return known
    raise ValueError(f"number_format: knows {', '.join(f.name for f in FORMATS)}, got {dtype}")
