"""Pooling of regions: loops, the peer, borders, derivatives, identities, dtypes, NaNs, empty calls, graphs."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from tests.parts.regions import loops
from tests.parts.regions.peer import torchvision

from volvelle.functional import (
    deform_ps_roi_pool,
    deform_roi_pool,
    ps_roi_align,
    ps_roi_pool,
    roi_align,
    roi_pool,
)
from volvelle.parts.regions.rois import half_away

CONVENTIONS = ("torchvision", "rfcn", "thundernet")
K = 3


def maps(channels, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, 7, 9, generator=g, dtype=torch.float64).to(dtype)


def rois(n=12, seed=0):
    """Regions of both images: inside, over every border, reversed, without area, far larger than the map."""
    g = torch.Generator().manual_seed(seed)
    corners = torch.rand(n, 4, generator=g, dtype=torch.float64) * 36 - 6
    corners[:, 2:] = corners[:, :2] + torch.rand(n, 2, generator=g, dtype=torch.float64) * 25
    corners[0] = torch.tensor([20.0, 18, 9, 5])
    corners[1] = 7.0
    corners[2] = torch.tensor([-60.0, -50, 90, 80])
    return torch.cat((torch.randint(0, 2, (n, 1), generator=g).double(), corners), dim=1)


def offsets(n=12):
    return torch.randn(n, 2, K, K, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def moved(function, offset, **options):
    return lambda x, r: function(x, r, offset[: len(r)].to(r.dtype), K, 0.25, 2, **options)


EVERY = {
    "roi_align": (lambda x, r: roi_align(x, r, K, 0.25, 2, True), 4),
    "roi_align, as many samples as pixels": (lambda x, r: roi_align(x, r, K, 0.25), 4),
    "roi_pool": (lambda x, r: roi_pool(x, r, K, 0.25), 4),
    "ps_roi_align": (lambda x, r: ps_roi_align(x, r, K, 0.25, 2), 18),
    "ps_roi_align, as many": (lambda x, r: ps_roi_align(x, r, K, 0.25), 18),
    "ps_roi_align, thundernet": (
        lambda x, r: ps_roi_align(x, r, K, 0.25, 2, reduce="max", convention="thundernet"), 18,
    ),
    "ps_roi_align, rfcn": (lambda x, r: ps_roi_align(x, r, K, 0.25, 2, convention="rfcn"), 18),
    "ps_roi_pool": (lambda x, r: ps_roi_pool(x, r, K, 0.25), 18),
    "deform_roi_pool": (moved(deform_roi_pool, offsets()), 4),
    "deform_ps_roi_pool": (moved(deform_ps_roi_pool, offsets(), reduce="max"), 18),
}  # fmt: skip
QUANTISED = {"roi_pool", "ps_roi_pool", "ps_roi_align, rfcn", "deform_ps_roi_pool"}
EACH = pytest.mark.parametrize("name", EVERY)


def close(ours, theirs):
    torch.testing.assert_close(ours, torch.as_tensor(theirs), atol=1e-12, rtol=0)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [1, 2, -1])
def test_roi_align_is_its_loop(ratio, aligned):
    x, r = maps(2), rois()
    close(roi_align(x, r, K, 0.25, ratio, aligned), loops.roi_align(x.numpy(), r.tolist(), K, 0.25, ratio, aligned))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_position_sensitive_alignment_is_its_loop(reduce, convention):
    x, r, options = maps(18), rois(), {"reduce": reduce, "convention": convention}
    close(ps_roi_align(x, r, K, 0.25, 2, **options), loops.ps_roi_align(x.numpy(), r.tolist(), K, 0.25, 2, **options))
    found = deform_ps_roi_pool(x, r, offsets(), K, 0.25, 2, 0.3, **options)
    options |= {"offset": offsets().numpy(), "gamma": 0.3}
    close(found, loops.ps_roi_align(x.numpy(), r.tolist(), K, 0.25, 2, **options))


def test_whole_pixel_poolings_are_their_loops():
    x, r = maps(18), rois()
    r[3:6, 1:] = torch.tensor([[2.0, 6, 10, 18], [-2, -6, 10, 14], [6, 6, 30, 22]])  # halves at a scale of 1/4
    close(roi_pool(x, r, K, 0.25), loops.roi_pool(x.numpy(), r.tolist(), K, 0.25))
    for convention in ("torchvision", "rfcn"):
        found = ps_roi_pool(x, r, K, 0.25, convention=convention)
        close(found, loops.ps_roi_pool(x.numpy(), r.tolist(), K, 0.25, convention))


def test_halves_round_away_from_zero():
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -2.5, math.nextafter(0.5, 0)], dtype=torch.float64)
    assert half_away(halves).tolist() == [1, 2, 3, -1, -3, 0]
    assert half_away(halves).tolist() != halves.round().tolist()


@EACH
def test_derivatives_at_the_borders(name):
    function, channels = EVERY[name]
    x = maps(channels)[:, :, :4, :5].requires_grad_()
    corners = torch.tensor([[-3.1, 2.3, 13.7, 18.9], [5.2, 6.1, 21.3, 12.9]], dtype=torch.float64)
    inputs = (x, corners) if name in QUANTISED else (x, corners.requires_grad_())

    def run(x, corners):
        return function(x, torch.cat((torch.tensor([[0.0], [1.0]], dtype=torch.float64), corners), dim=1))

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@EACH
def test_the_gradient_is_the_adjoint(name):
    """<J v, u> = <v, J' u>: all but the maxima are linear in the map."""
    function, channels = EVERY[name]
    x, v, r = maps(channels).requires_grad_(), maps(channels, 1), rois()
    out = function(x, r)
    u = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    (back,) = torch.autograd.grad(out, x, u)
    along = (function(x + 1e-7 * v, r) - function(x - 1e-7 * v, r)) / 2e-7
    torch.testing.assert_close((along * u).sum(), (back * v).sum(), rtol=1e-6, atol=1e-6)


@EACH
def test_odd_regions_and_maps_stay_local(name):
    function, channels = EVERY[name]
    x, r = maps(channels, dtype=torch.float32), rois().float()
    clean = function(x, r)
    for odd in (math.nan, math.inf, 1e30, -1e30):
        bad = r.clone()
        bad[4, 1:] = torch.tensor([0.0, 0.0, odd, odd])
        bad[5, 1:] = odd
        found = function(x, bad)
        keep = [i for i in range(len(r)) if i not in (4, 5)]
        assert torch.equal(found[keep], clean[keep])
    other = x.clone()
    other[1] = math.nan
    assert torch.equal(function(other, r)[r[:, 0] == 0], clean[r[:, 0] == 0]), "images are apart"


@EACH
def test_empty_calls_have_gradients_of_zero(name):
    function, channels = EVERY[name]
    x = maps(channels).requires_grad_()
    out = function(x, rois()[:0])
    assert out.shape[0] == 0
    assert out.shape[2:] == (K, K)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert not gradient.any()
    assert function(maps(channels)[:0], rois()[:0]).shape == out.shape


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_autocast(name, dtype):
    function, channels = EVERY[name]
    x, r = maps(channels).to(dtype), rois()[3:].float()
    exact = function(x.double(), r)
    found = function(x, r)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= 16 * torch.finfo(dtype).eps * x.double().abs().max()
    if dtype != torch.float16:  # torch's own cat refuses that mix
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(function(x, r), found)


def test_a_whole_map_is_adaptive_pooling():
    x = torch.randn(2, 4, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = torch.tensor([[0.0, 0, 0, 9, 6], [1, 0, 0, 9, 6]], dtype=torch.float64)
    expected = torch.nn.functional.adaptive_avg_pool2d(x, (2, 3))
    close(roi_align(x, whole, (2, 3), 1.0, -1, True), expected)
    closed = whole - torch.tensor([0, 0, 0, 1, 1])
    close(roi_pool(x, closed, (2, 3)), torch.nn.functional.adaptive_max_pool2d(x, (2, 3)))
    spread = x.repeat_interleave(6, 1)  # each map for all of its bins
    close(ps_roi_pool(spread, whole, (2, 3)), expected)
    close(ps_roi_align(spread, whole, (2, 3)), expected)


def test_lists_are_rois_and_rows_alone():
    x, r = maps(4), rois()
    listed = [r[r[:, 0] == i, 1:] for i in (0, 1)]
    together = torch.cat([r[r[:, 0] == i] for i in (0, 1)])
    assert torch.equal(roi_align(x, listed, K, 0.25, 2), roi_align(x, together, K, 0.25, 2))
    close(torch.cat([roi_align(x, row, K, 0.25) for row in r.split(1)]), roi_align(x, r, K, 0.25))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "roi_align" else pytest.mark.slow) for n in EVERY])
def test_one_graph_for_every_number_of_regions(name):
    function, channels = EVERY[name]

    class Pool(torch.nn.Module):
        def forward(self, x, r):
            return function(x, r)

    torch.compiler.reset()
    x, r = maps(channels).requires_grad_(), rois()
    compiled = torch.compile(Pool(), fullgraph=True, backend="aot_eager")
    close(compiled(x, r), function(x, r))
    u = torch.ones_like(function(x, r))
    close(torch.autograd.grad(compiled(x, r), x, u)[0], torch.autograd.grad(function(x, r), x, u)[0])
    if "deform" not in name:  # its offsets are captured here
        dynamic = ({}, {0: torch.export.Dim("r")})
        program = torch.export.export(Pool(), (x.detach(), r), dynamic_shapes=dynamic).module()
        close(program(x.detach(), r[:5]), function(x, r[:5]).detach())


@pytest.mark.peer
def test_torchvision_agrees():
    peer, r = torchvision(), rois(60)
    r = r[2:]  # without the reversed one and the one without area, which torchvision takes for NaN
    x, own = maps(4).requires_grad_(), maps(18).requires_grad_()
    inner = r[(r[:, 3] * 0.25 < 7.5) & (r[:, 4] * 0.25 < 5.5)]  # beyond, its ps_roi_pool leaves the border out
    cases = [
        (x, r, roi_pool, lambda m, b: peer.roi_pool(m, b, 0.25, K, K)[0]),
        (own, inner, ps_roi_pool, lambda m, b: peer.ps_roi_pool(m, b, 0.25, K, K)[0]),
    ]
    for n in (1, 2, -1):
        for a in (False, True):
            ours = partial(roi_align, sampling_ratio=n, aligned=a)
            cases.append((x, r, ours, lambda m, b, n=n, a=a: peer.roi_align(m, b, 0.25, K, K, n, a)))
        ours = partial(ps_roi_align, sampling_ratio=n)
        cases.append((own, r, ours, lambda m, b, n=n: peer.ps_roi_align(m, b, 0.25, K, K, n)[0]))
    for m, b, ours, theirs in cases:
        found, expected = ours(m, b, K, spatial_scale=0.25), theirs(m, b)
        close(found, expected)
        u = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=found.dtype)
        close(torch.autograd.grad(found, m, u)[0], torch.autograd.grad(expected, m, u)[0])


def test_bad_calls_are_named():
    x, r = maps(4), rois()
    with pytest.raises(ValueError, match=r"roi_align: boxes must be \(r, 5\).*got shape \(12, 4\)"):
        roi_align(x, r[:, 1:], K)
    with pytest.raises(ValueError, match="roi_align: the images of the boxes must lie in 0 to 1"):
        roi_align(x, r + 2, K)
    with pytest.raises(ValueError, match="ps_roi_align: input must have a multiple of 9 channels"):
        ps_roi_align(x, r, K)
    with pytest.raises(ValueError, match="takes a sampling_ratio from 1 on, got -1"):
        ps_roi_align(maps(9), r, K, convention="rfcn")
    with pytest.raises(
        ValueError, match=r"deform_roi_pool: offset must be .* = \(12, 2, 3, 3\), got shape \(12, 2, 3, 2\)"
    ):
        deform_roi_pool(x, r, offsets()[..., :2], K)
