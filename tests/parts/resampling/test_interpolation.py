"""Nearest and bilinear: the coordinates written out, both conventions, and torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from volvelle.functional import resize_bilinear, resize_nearest

PAIRS = [(1, 1), (1, 4), (2, 1), (3, 6), (4, 7), (5, 3), (7, 14), (9, 27), (6, 11), (12, 5)]


def nearest(x, n):
    return [x[i * len(x) // n] for i in range(n)]


def bilinear(x, n, corners):
    found = []
    for i in range(n):
        if corners:
            at = i * (len(x) - 1) / (n - 1) if n > 1 else 0.0
        else:
            at = min(max((i + 0.5) * len(x) / n - 0.5, 0.0), len(x) - 1.0)
        j = min(math.floor(at), len(x) - 1)
        after = min(j + 1, len(x) - 1)
        found.append((1 - (at - j)) * x[j] + (at - j) * x[after])
    return found


def both_axes(image, size, line):
    rows = np.array([line(row, size[1]) for row in image])
    return np.array([line(column, size[0]) for column in rows.T]).T


@pytest.mark.parametrize(("n", "m"), PAIRS)
def test_the_coordinates(n, m):
    generator = np.random.default_rng(0)
    image = generator.normal(size=(n, 5))
    x = torch.tensor(image).expand(2, 3, n, 5)
    for size in ((m, 5), (m, 8)):
        cases = [
            (resize_nearest(x, size), nearest),
            (resize_bilinear(x, size), lambda row, k: bilinear(row, k, False)),
            (resize_bilinear(x, size, align_corners=True), lambda row, k: bilinear(row, k, True)),
        ]
        for found, line in cases:
            expected = both_axes(image, size, line)
            np.testing.assert_allclose(found[1, 2].numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [(10, 14), (5, 7), (3, 20)])
def test_torch(size):
    x = torch.randn(2, 3, 5, 7)
    assert torch.equal(resize_nearest(x, size), F.interpolate(x, size))
    for corners in (False, True):
        theirs = F.interpolate(x, size, mode="bilinear", align_corners=corners)
        assert torch.equal(resize_bilinear(x, size, align_corners=corners), theirs)


def test_what_each_convention_keeps():
    ramp = torch.arange(6.0).expand(1, 1, 3, 6)
    corners = resize_bilinear(ramp, (3, 16), align_corners=True)[0, 0, 0]
    torch.testing.assert_close(corners, torch.linspace(0, 5, 16))
    areas = resize_bilinear(ramp, (3, 12))[0, 0, 0]
    torch.testing.assert_close(areas[1:-1], torch.arange(10) / 2 + 0.25)
    assert areas.mean() == ramp.mean()


@pytest.mark.parametrize("resize", [resize_nearest, resize_bilinear])
def test_what_does_not_fit_is_named(resize):
    name = resize.__name__
    with pytest.raises(ValueError, match=rf"{name}: input must be \(b, c, y, x\).*got \(3, 4\)"):
        resize(torch.zeros(3, 4), (2, 2))
    with pytest.raises(ValueError, match=rf"{name}: input .*at least one pixel, got \(1, 1, 0, 4\)"):
        resize(torch.zeros(1, 1, 0, 4), (2, 2))
    with pytest.raises(ValueError, match=rf"{name}: size must be two numbers of at least 1, got \(2, 0\)"):
        resize(torch.zeros(1, 1, 3, 4), (2, 0))
