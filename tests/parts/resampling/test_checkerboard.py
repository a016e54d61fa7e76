"""The measure against a Fourier transform; 0 for what is even, 1 for a board, the same at any scale and offset."""

from __future__ import annotations

import pytest
import torch

from volvelle.functional import checkerboard, resize_bilinear, resize_nearest


@pytest.mark.parametrize("s", [2, 3, 4])
def test_it_is_the_energy_at_the_lattices_frequencies(s):
    x = torch.randn(2, 3, 4 * s, 5 * s, dtype=torch.float64)
    energy = torch.fft.fft2(x).abs().square()
    lattice = energy[..., ::4, ::5].sum((-2, -1)) - energy[..., 0, 0]
    torch.testing.assert_close(checkerboard(x, s), lattice / (energy.sum((-2, -1)) - energy[..., 0, 0]))


@pytest.mark.parametrize("s", [2, 3, 4])
def test_nearest_has_none_and_smooth_maps_hardly_any(s):
    torch.manual_seed(0)
    noise = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    assert checkerboard(resize_nearest(noise, (9 * s, 7 * s)), s).max() < 1e-25
    y, x = torch.meshgrid(torch.linspace(0, 3, 16), torch.linspace(0, 2, 16), indexing="ij")
    smooth = (y.sin() + x.cos() * y)[None, None]
    for corners in (False, True):
        assert checkerboard(resize_bilinear(smooth, (16 * s, 16 * s), align_corners=corners), s) < 1 / 16**2
    ramp = torch.arange(16.0 * s, dtype=torch.float64).expand(16 * s, -1)
    assert checkerboard(ramp, s) == pytest.approx((s * s - 1) / ((16 * s) ** 2 - 1))


@pytest.mark.parametrize("s", [2, 3])
def test_a_pattern_has_all_and_half_of_it_half(s):
    torch.manual_seed(0)
    tile = torch.randn(s, s, dtype=torch.float64)
    board = tile.repeat(6, 6)
    assert checkerboard(board, s) == pytest.approx(1)
    slow = resize_nearest(torch.randn(1, 1, 6, 6, dtype=torch.float64), (6 * s, 6 * s))[0, 0]
    slow = slow * board.std() / slow.std()
    assert checkerboard(board + slow, s) == pytest.approx(0.5)


@pytest.mark.parametrize(("scale", "offset"), [(1e-6, 0), (1e6, 0), (1, 5), (-3, 2)])
def test_scale_and_offset_do_not_matter(scale, offset):
    x = torch.randn(3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(checkerboard(scale * x + offset), checkerboard(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_constants_and_rounding_are_no_pattern(dtype):
    flat = torch.full((2, 8, 8), 0.3, dtype=dtype)
    assert checkerboard(flat).eq(0).all()
    flat[..., ::2, ::2] = torch.nextafter(flat[..., ::2, ::2], torch.ones((), dtype=dtype))
    assert checkerboard(flat).eq(0).all()
    assert checkerboard(torch.zeros(2, 8, 8, dtype=dtype, requires_grad=True)).sum().backward() is None


def test_gradients_vanish_where_there_is_nothing():
    flat = torch.ones(1, 4, 4, requires_grad=True)
    checkerboard(flat).sum().backward()
    assert flat.grad is not None
    assert flat.grad.eq(0).all()


def test_what_is_beyond_whole_blocks_is_left_out():
    x = torch.randn(2, 9, 11)
    assert torch.equal(checkerboard(x, 4), checkerboard(x[:, :8, :8], 4))
    x[0, 0, 0] = torch.nan
    assert checkerboard(x)[0].isnan(), "a broken map is not an even one"
    assert checkerboard(x)[1].isfinite()


@pytest.mark.parametrize(("shape", "factor"), [((8, 8), 1), ((3, 8), 4), ((8,), 2)])
def test_what_does_not_fit_is_named(shape, factor):
    with pytest.raises(ValueError, match=r"checkerboard: x must be .*factor >= 2"):
        checkerboard(torch.zeros(shape), factor)
