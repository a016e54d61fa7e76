"""Max-unpooling: the inverse of pooling on what it kept, odd sizes, overlaps, torch, bad calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from volvelle.functional import max_unpool2d

POOLS = [
    {"kernel_size": 2},
    {"kernel_size": 3},
    {"kernel_size": (2, 3)},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": (1, 2), "padding": (1, 0)},
]


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("size", [(6, 6), (7, 9), (8, 5)])
def test_values_return_to_where_they_came_from(pool, size):
    x = torch.randn(2, 3, *size)
    values, indices = F.max_pool2d(x, **pool, return_indices=True)
    found = max_unpool2d(values, indices, **pool, output_size=size)
    expected = torch.zeros_like(x)
    for b in range(2):
        for c in range(3):
            for value, index in zip(values[b, c].flatten(), indices[b, c].flatten(), strict=True):
                expected[b, c].view(-1)[index] = value
    assert torch.equal(found, expected)
    assert torch.equal(found, F.max_unpool2d(values, indices, **pool, output_size=size))
    assert torch.equal(found[found != 0], x[found != 0])


def test_the_default_size_and_longer_ones():
    x = torch.randn(2, 3, 6, 4)
    values, indices = F.max_pool2d(x, 2, return_indices=True)
    default = max_unpool2d(values, indices, 2)
    assert default.shape == x.shape
    assert torch.equal(default, max_unpool2d(values, indices, 2, output_size=x.shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_size": (8, 7)}, r"output_size must be within a stride of \(6, 6\).*got \(8, 7\)"),
        ({"output_size": (4, 6)}, r"got \(4, 6\)"),
        ({"stride": 1}, r"indices"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    values, indices = F.max_pool2d(torch.randn(2, 3, 7, 7), 2, return_indices=True)
    if "stride" in options:
        with pytest.raises(
            ValueError, match=r"indices must be int64 of the input's shape \(2, 3, 3, 3\), got torch.in"
        ):
            max_unpool2d(values, indices.int(), 2)
        with pytest.raises(ValueError, match=r"indices must be int64.*got torch.int64 of shape \(2, 3, 3, 2\)"):
            max_unpool2d(values, indices[..., :2], 2)
        return
    with pytest.raises(ValueError, match=message):
        max_unpool2d(values, indices, 2, **options)
