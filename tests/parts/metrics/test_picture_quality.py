"""PSNR, SSIM, Fréchet distance, precision and recall: peers, definitions by loop, and limits."""

from __future__ import annotations

import math

import pytest
import torch

from volvelle.parts.metrics.frechet import feature_statistics, frechet_distance
from volvelle.parts.metrics.manifold_precision_recall import manifold_precision_recall
from volvelle.parts.metrics.psnr import peak_signal_noise_ratio
from volvelle.parts.metrics.ssim import structural_similarity

F64 = torch.float64


def pair(shape=(3, 3, 17, 23), seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=draw, dtype=F64)
    return x, (x + 0.2 * torch.randn(shape, generator=draw, dtype=F64)).clamp(0, 1)


@pytest.mark.peer
def test_psnr_and_ssim_equal_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    x, y = pair()
    ours = peak_signal_noise_ratio(x, y, 1.0)
    theirs = [metrics.peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1.0) for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=F64))
    # Its windows are 11 wide at truncate=3.5, and it averages inside the border as the paper does.
    options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    theirs = [
        metrics.structural_similarity(a.numpy(), b.numpy(), channel_axis=0, **options)
        for a, b in zip(x, y, strict=True)
    ]
    torch.testing.assert_close(structural_similarity(x, y, 1.0), torch.tensor(theirs, dtype=F64))


@pytest.mark.peer
def test_bytes_equal_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    x, y = ((255 * t).round().to(torch.uint8) for t in pair((2, 1, 16, 16)))
    theirs = [metrics.peak_signal_noise_ratio(a.numpy(), b.numpy()) for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(peak_signal_noise_ratio(x, y, 255), torch.tensor(theirs, dtype=F64))


def test_ssim_equals_its_definition_at_one_window():
    x, y = pair((1, 1, 11, 11))
    at = torch.arange(11, dtype=F64) - 5
    g = (-(at**2) / 4.5).exp()
    w = g[:, None] * g / (g.sum() ** 2)
    mx, my = ((w * t[0, 0]).sum() for t in (x, y))
    vx, vy, cov = (
        (w * (s[0, 0] - m) * (t[0, 0] - n)).sum() for s, m, t, n in ((x, mx, x, mx), (y, my, y, my), (x, mx, y, my))
    )
    c1, c2 = 0.01**2, 0.03**2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    torch.testing.assert_close(structural_similarity(x, y, 1.0), expected[None])


def test_ssim_in_fp32_keeps_small_contrasts_and_gradients():
    x, y = pair((2, 1, 12, 13))
    x, y = 100 + 0.01 * x, 100 + 0.01 * y
    wide = structural_similarity(x, y, 0.01)
    torch.testing.assert_close(structural_similarity(x.float(), y.float(), 0.01), wide.float(), atol=2e-2, rtol=0)
    a, b = pair((1, 1, 11, 12))
    assert torch.autograd.gradcheck(lambda a: structural_similarity(a, b, 1.0), a.requires_grad_())
    assert torch.isnan(structural_similarity(a.detach() * torch.nan, b, 1.0)).all()
    assert structural_similarity(a.detach().bfloat16(), b.bfloat16(), 1.0).dtype == torch.float32


def test_ssim_s_range_window_and_autocast():
    x, y = pair((2, 1, 12, 13))
    ours = structural_similarity(x, y, 1.0)
    torch.testing.assert_close(structural_similarity(255 * x, 255 * y, 255.0), ours)
    light = (2 * x * y + 1e-4) / (x**2 + y**2 + 1e-4)  # one pixel has no variance
    torch.testing.assert_close(structural_similarity(x, y, 1.0, window=1), light.mean((1, 2, 3)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(structural_similarity(x.float(), y.float(), 1.0), ours.float())


def test_limits_and_bad_input():
    x, _ = pair((2, 1, 12, 12))
    assert torch.isinf(peak_signal_noise_ratio(x, x, 1.0)).all()
    torch.testing.assert_close(
        peak_signal_noise_ratio(x, x + 0.5, 1.0), torch.full((2,), 20 * math.log10(2), dtype=F64)
    )
    torch.testing.assert_close(structural_similarity(x, x, 1.0), torch.ones(2, dtype=F64))
    for *bad, span in ((x, x[:1], 1.0), (x[:0], x[:0], 1.0), (x[0, 0, 0], x[0, 0, 0], 1.0), (x, x, 0.0)):
        with pytest.raises(ValueError, match="equal shape and data_range > 0"):
            peak_signal_noise_ratio(*bad, span)
    with pytest.raises(ValueError, match="at least 11"):
        structural_similarity(x[:, :, :9], x[:, :, :9], 1.0)
    assert structural_similarity(x[:, :, :11, :11], x[:, :, :11, :11], 1.0).shape == (2,)
    for wrong in ((x, x, 0.0), (x[0], x[0], 1.0), (x, x[:1], 1.0)):
        with pytest.raises(ValueError, match="data_range > 0"):
            structural_similarity(*wrong)
    for window in (0, 4, -1):
        with pytest.raises(ValueError, match="window odd"):
            structural_similarity(x, x, 1.0, window=window)


# Features


def gaussian(n, d, seed, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=draw, dtype=F64)
    return scale * torch.randn(n, d, generator=draw, dtype=F64) @ mix


@pytest.mark.parametrize(("n", "d"), [(50, 4), (3, 8)])
def test_frechet_equals_the_matrix_square_root(n, d):
    linalg = pytest.importorskip("scipy.linalg")
    import numpy as np

    one, two = gaussian(n, d, 0), gaussian(n + 3, d, 1) + 0.3
    (m1, s1), (m2, s2) = feature_statistics(one), feature_statistics(two)
    torch.testing.assert_close(s1, torch.from_numpy(np.cov(one.numpy(), rowvar=False)))
    root = np.trace(linalg.sqrtm(s1.numpy() @ s2.numpy()).real)
    expected = float((m1 - m2).square().sum() + s1.trace() + s2.trace()) - 2 * root
    tolerance = 1e-9 if n > d else 1e-4  # without full rank it is sqrtm that loses digits
    assert float(frechet_distance(m1, s1, m2, s2)) == pytest.approx(expected, rel=tolerance)


@pytest.mark.slow  # for its import
@pytest.mark.peer
def test_frechet_equals_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    one, two = gaussian(60, 5, 0), gaussian(70, 5, 1)
    statistics = (*feature_statistics(one), *feature_statistics(two))
    torch.testing.assert_close(frechet_distance(*statistics), fid._compute_fid(*statistics), rtol=1e-6, atol=1e-6)


def test_frechet_s_closed_forms():
    mean, one = torch.zeros(3), torch.eye(3)
    assert float(frechet_distance(mean, one, mean, one)) == 0
    spread = torch.diag(torch.tensor([1.0, 4.0, 9.0]))
    assert float(frechet_distance(mean, one, mean + 2, spread)) == pytest.approx(12 + 0 + 1 + 4)
    assert float(frechet_distance(mean, 0 * one, mean + 1, 0 * one)) == pytest.approx(3)
    assert torch.isnan(frechet_distance(mean * torch.nan, one, mean, one))
    a, b = (feature_statistics(gaussian(40, 3, s)) for s in (0, 1))
    torch.testing.assert_close(frechet_distance(*a, *b), frechet_distance(*b, *a))
    with pytest.raises(ValueError, match="means"):
        frechet_distance(mean, one, mean[:2], one)
    with pytest.raises(ValueError, match="two rows"):
        feature_statistics(torch.zeros(1, 3))


def test_frechet_of_equals_is_never_below_zero():
    """Rounding may leave either sign before it is cut off."""
    for seed in range(20):
        same = feature_statistics(gaussian(30, 5, seed))
        assert 0 <= float(frechet_distance(*same, *same)) < 1e-12 * float(same[1].trace())


def by_loop(real, fake, k):
    def inside(points, around):
        radii = [sorted(float((a - b).norm()) for b in around)[k] for a in around]
        return sum(any(float((p - a).norm()) <= r for a, r in zip(around, radii, strict=True)) for p in points) / len(
            points
        )

    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_the_loop(k):
    real, fake = gaussian(13, 2, 0), gaussian(11, 2, 1, 0.5)
    found = manifold_precision_recall(real, fake, k, block=5)
    assert tuple(map(float, found)) == pytest.approx(by_loop(real, fake, k))


def test_one_good_picture_repeated_has_no_recall_and_all_of_them_have():
    real = gaussian(200, 3, 0)
    precision, recall = manifold_precision_recall(real, real[:1] + 1e-6 * torch.randn(200, 3, dtype=F64))
    assert float(precision) == 1
    assert float(recall) < 0.05
    assert tuple(map(float, manifold_precision_recall(real, real))) == (1, 1)
    assert tuple(map(float, manifold_precision_recall(real, real + 100))) == (0, 0)
    with pytest.raises(ValueError, match="n, m > k"):
        manifold_precision_recall(real[:3], real)


def test_the_nearest_neighbour_that_is_the_point_itself_is_not_counted(monkeypatch):
    original = torch.Tensor.kthvalue
    monkeypatch.setattr(torch.Tensor, "kthvalue", lambda x, k, dim: original(x, k - 1, dim))
    with pytest.raises(AssertionError):
        test_precision_and_recall_equal_the_loop(1)
