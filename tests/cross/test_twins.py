"""A function is the truth; its Module only holds weights and arguments: module(x) == function(x, weights), bitwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.cross.twin_samples import SAMPLES

from volvelle.export import PUBLIC, import_parts

import_parts()
TWINS = {entry.name: entry for entry in PUBLIC if entry.twin is not None}


def same(ours: Any, theirs: Any) -> bool:
    """Bitwise equality of tensors and of nested tuples and lists of them, shapes and dtypes included."""
    if isinstance(ours, torch.Tensor):
        return isinstance(theirs, torch.Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, tuple | list):
        return (
            isinstance(theirs, tuple | list)
            and len(ours) == len(theirs)
            and all(same(a, b) for a, b in zip(ours, theirs, strict=True))
        )
    return ours == theirs


def test_every_twin_has_a_sample_and_every_sample_a_twin():
    assert sorted(SAMPLES) == sorted(TWINS), "add the missing rows to tests/cross/twin_samples.py"


@pytest.mark.parametrize("name", sorted(set(TWINS) & set(SAMPLES)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_module_equals_its_function(name, dtype):
    torch.manual_seed(0)
    sample = SAMPLES[name](dtype)
    assert type(sample.module) is PUBLIC[name].target
    expected = sample.function()
    assert same(sample.module(*sample.inputs), expected)
    assert not same(torch.zeros(1), expected), "a constant zero proves nothing"


def test_the_comparison_can_fail():
    x = torch.arange(3.0)
    assert same((x, [x]), (x, [x.clone()]))
    assert not same(x, x + 1e-7)
    assert not same(x, x.double())
    assert not same((x,), (x, x))
    assert not same(x, None)
