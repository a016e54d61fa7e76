"""Every region operator in ONNX Runtime, exported once for any number of regions or boxes."""

from __future__ import annotations

import pytest
import torch
from tests.onnx_runtime import exported
from tests.parts.regions.test_boxes import EVERY as OVERLAPS
from tests.parts.regions.test_boxes import boxes
from tests.parts.regions.test_nms import crowd
from tests.parts.regions.test_pooling import EVERY, K, maps, offsets, rois

from volvelle.functional import (
    batched_nms,
    box_convert,
    clip_boxes,
    decode_boxes,
    deform_conv2d,
    deform_ps_roi_pool,
    deform_roi_pool,
    encode_boxes,
    nms,
    soft_nms,
)


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def same(function, cases, folder, free, exact=False):
    """Export the first case, run all of them; the other ones have other lengths, 0 among them."""
    run = exported(Call(function), cases[0], folder, (free,))
    for inputs in cases:
        expected = function(*inputs)
        for ours, theirs in zip(run(*inputs), expected if isinstance(expected, tuple) else (expected,), strict=True):
            if exact:
                assert torch.equal(ours, theirs)
            else:
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def regions(n, seed):
    return rois(n, seed).float()[-n:] if n else rois().float()[:0]


MOVED = [(deform_roi_pool, 4, {}), (deform_ps_roi_pool, 18, {}), (deform_ps_roi_pool, 18, {"reduce": "max"})]


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("name", [name for name in EVERY if "deform" not in name])
def test_pooling(name, tmp_path):
    function, channels = EVERY[name]
    x = maps(channels, dtype=torch.float32)
    cases = [(x, regions(n, seed)) for n, seed in ((12, 0), (5, 1), (40, 2), (0, 0))]
    same(function, cases, tmp_path, ({}, {0: torch.export.Dim("r")}))


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize(("function", "channels", "options"), MOVED)
def test_pooling_with_bins_that_move(function, channels, options, tmp_path):
    x, r = maps(channels, dtype=torch.float32), torch.export.Dim("r")
    cases = [(x, regions(n, seed), offsets(n).float()) for n, seed in ((12, 0), (40, 2), (0, 0))]
    same(lambda x, b, o: function(x, b, o, K, 0.25, 2, **options), cases, tmp_path, ({}, {0: r}, {0: r}))


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("version", [1, 2])
def test_deformable_convolution(version, tmp_path):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 4, 7, 8, generator=g), torch.randn(6, 2, 3, 3, generator=g)
    offset, mask = 3 * torch.randn(3, 36, 4, 4, generator=g), torch.rand(3, 18, 4, 4, generator=g)

    def call(x, offset, *mask):
        return deform_conv2d(x, offset, weight, torch.ones(6), 2, 1, mask=mask[0] if mask else None)

    inputs = (x, offset, mask)[: version + 1]
    free = ({0: torch.export.Dim("b")},) * len(inputs)
    same(call, [inputs, tuple(one[:2] for one in inputs)], tmp_path, free)


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("name", ["nms", "batched_nms", "soft_nms"])
def test_suppression(name, tmp_path):
    calls = {
        "nms": lambda b, s, i: (nms(b, s, 0.4), i),
        "batched_nms": lambda b, s, i: batched_nms(b, s, i, 0.4),
        "soft_nms": lambda b, s, i: soft_nms(b, s, score_threshold=0.05, idxs=i),
    }
    n = torch.export.Dim("n")
    cases = [crowd(size, seed, dtype=torch.float32) for size, seed in ((40, 0), (1, 1), (150, 2), (0, 3))]
    same(calls[name], cases, tmp_path, ({0: n},) * 3, exact=name != "soft_nms")


@pytest.mark.slow
@pytest.mark.peer
def test_boxes(tmp_path):
    n, m = torch.export.Dim("n"), torch.export.Dim("m")

    def call(a, b, deltas):
        overlaps = (function(a, b) for function in OVERLAPS)
        others = (clip_boxes(a, (20, 30)), box_convert(a, "xyxy", "cxcywh"))
        return *overlaps, encode_boxes(a, a.flip(1) + 9), decode_boxes(deltas, a), *others

    def case(k, other, seed):
        first, second = boxes(k, seed, torch.float32), boxes(other, seed + 1, torch.float32)
        return first, second, torch.randn(k, 4, generator=torch.Generator().manual_seed(seed))

    cases = [case(*sizes, seed) for seed, sizes in enumerate(((9, 6), (1, 4), (0, 5)))]
    same(call, cases, tmp_path, ({0: n}, {0: m}, {0: n}))
