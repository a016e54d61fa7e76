"""Bit layouts against what struct, numpy and torch store."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from volvelle.functional import number_format
from volvelle.parts.precision.formats import BF16, FORMATS, FP16, FP32, FP64

CODES = {FP64: ("<d", "<Q"), FP32: ("<f", "<I"), FP16: ("<e", "<H")}
IDS = [f.name for f in FORMATS]


def same(a, b):
    return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


@pytest.mark.parametrize("kind", FORMATS, ids=IDS)
def test_ranges_are_those_of_torch_and_numpy(kind):
    info = torch.finfo(kind.dtype)
    assert (kind.bits, kind.largest, kind.smallest_normal) == (info.bits, info.max, info.tiny)
    assert kind.epsilon == info.eps
    if kind is not BF16:
        numpy = np.finfo({FP64: np.float64, FP32: np.float32, FP16: np.float16}[kind])
        assert kind.smallest_subnormal == float(numpy.smallest_subnormal)
    assert number_format(kind.dtype) is kind


def test_every_half_and_bfloat_pattern_decodes_to_what_the_machine_reads():
    patterns = np.arange(2**16, dtype=np.uint16)
    half = patterns.view(np.float16).astype(np.float64)
    brain = torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16).double().numpy()
    for kind, wanted in ((FP16, half), (BF16, brain)):
        found = [kind.decode(int(p)) for p in patterns]
        assert all(same(a, b) for a, b in zip(found, wanted.tolist(), strict=True)), kind.name


@given(st.floats(width=64), st.floats(width=32))
def test_wide_patterns_decode_to_what_struct_reads(double, single):
    for kind, x in ((FP64, double), (FP32, single)):
        value, whole = CODES[kind]
        (pattern,) = struct.unpack(whole, struct.pack(value, x))
        assert same(kind.decode(pattern), x)
        bits = f"{pattern:0{kind.bits}b}"
        e = kind.exponent_bits
        assert math.isnan(x) or kind.layout(x) == f"{bits[0]} {bits[1 : 1 + e]} {bits[1 + e :]}"


@pytest.mark.parametrize("kind", FORMATS, ids=IDS)
@pytest.mark.parametrize("x", [1.0, -1.5, 0.0, 3e-5, 2047.0, 2048.0, 1e-7])
def test_the_step_leads_to_the_next_number(kind, x):
    """Half a step further the nearest number changes, and no number lies between."""
    here = torch.tensor(x, dtype=kind.dtype)
    value, step = abs(float(here)), kind.step(float(here))
    up = torch.tensor(value + step, dtype=torch.float64).to(kind.dtype)
    assert float(up) == value + step
    between = torch.tensor(value + 0.49 * step, dtype=torch.float64).to(kind.dtype)
    assert float(between) == value


def test_the_step_at_integers_is_where_counting_stops():
    for kind, last in ((FP16, 2048.0), (BF16, 256.0), (FP32, 2.0**24)):
        assert kind.step(last - 1) == 1
        assert kind.step(last) == 2
        counter = torch.tensor(last, dtype=kind.dtype)
        assert float(counter + 1) == last, "adding one is lost"


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"fp64, fp32, fp16, bf16, got torch\.int32"):
        number_format(torch.int32)
    with pytest.raises(ValueError, match="patterns of 16 bits"):
        FP16.decode(2**16)
    with pytest.raises(ValueError, match="must be finite"):
        FP32.step(math.inf)
