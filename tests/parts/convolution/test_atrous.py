"""Atrous convolution: the equation as loops, torch where torch can, any kernel, rate and stride, bad calls."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from volvelle.functional import atrous_conv1d, atrous_conv2d
from volvelle.nn import AtrousConv1d, AtrousConv2d
from volvelle.parts.lowrank.lora import LoRAUpdate

SIZES = [1, 2, 3, 4, 5]


def written_out(x, w, stride, rate):
    """y[i] = Σ_k x[s i + r k - p] w[k] for one channel, zeros outside."""
    n, taps = len(x), len(w)
    before = rate * (taps - 1) // 2
    places = range(-(-n // stride))
    return [sum(w[k] * x[j] for k in range(taps) if 0 <= (j := stride * i + rate * k - before) < n) for i in places]


@pytest.mark.parametrize(("taps", "rate", "stride"), list(itertools.product(SIZES, (1, 2, 5), (1, 2, 3))))
def test_sequences_equal_the_loop(taps, rate, stride):
    generator = np.random.default_rng(0)
    for n in (1, 4, 7, 12):
        x, w = generator.normal(size=n), generator.normal(size=taps)
        ours = atrous_conv1d(torch.tensor(x)[None, None], torch.tensor(w)[None, None], None, stride, rate)
        np.testing.assert_allclose(ours.flatten().numpy(), written_out(x, w, stride, rate), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("kernel", "rate", "stride"), [((3, 2), (2, 3), (2, 1)), ((4, 5), (1, 2), (3, 2))])
def test_images_are_both_axes(kernel, rate, stride):
    """A kernel that is a product of two acts as the loop on rows, then on columns."""
    generator = np.random.default_rng(1)
    image, high, wide = (
        generator.normal(size=(7, 9)),
        generator.normal(size=kernel[0]),
        generator.normal(size=kernel[1]),
    )
    rows = np.array([written_out(row, wide, stride[1], rate[1]) for row in image])
    expected = np.array([written_out(column, high, stride[0], rate[0]) for column in rows.T]).T
    weight = torch.tensor(np.outer(high, wide))[None, None]
    ours = atrous_conv2d(torch.tensor(image)[None, None], weight, None, stride, rate)
    np.testing.assert_allclose(ours[0, 0].numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("taps", SIZES)
@pytest.mark.parametrize("rate", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_stride_one_is_torchs_same_padding(taps, rate, groups):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 4, 6, 9), torch.randn(6, 4 // groups, taps, taps), torch.randn(6)
    theirs = F.conv2d(x, weight, bias, padding="same", dilation=rate, groups=groups)
    torch.testing.assert_close(atrous_conv2d(x, weight, bias, 1, rate, groups), theirs)
    torch.testing.assert_close(
        atrous_conv1d(x[:, :, 0], weight[..., 0], bias, 1, rate, groups),
        F.conv1d(x[:, :, 0], weight[..., 0], bias, padding="same", dilation=rate, groups=groups),
    )


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (5, 8), (9, 6)])
def test_the_size_depends_on_the_stride_alone(stride, size):
    expected = tuple(-(-n // stride) for n in size)
    for taps, rate in itertools.product(SIZES, (1, 4)):
        out = AtrousConv2d(1, 1, taps, stride=stride, dilation=rate)(torch.zeros(1, 1, *size))
        assert out.shape[2:] == expected
        assert (
            AtrousConv1d(1, 1, taps, stride=stride, dilation=rate)(torch.zeros(1, 1, size[1])).shape[2] == expected[1]
        )


def test_a_stride_takes_every_nth_output():
    x, weight = torch.randn(2, 3, 11, 8), torch.randn(4, 3, 3, 2)
    dense = atrous_conv2d(x, weight, dilation=2)
    torch.testing.assert_close(atrous_conv2d(x, weight, None, (2, 3), 2), dense[:, :, ::2, ::3])


def test_its_padding_attribute_is_the_padding_when_that_is_even():
    """Tools that fold or count read the attributes of nn.Conv2d."""
    layer, x = AtrousConv2d(3, 5, 3, dilation=4, stride=2), torch.randn(2, 3, 9, 9)
    theirs = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    assert torch.equal(layer(x), theirs)


def test_low_rank_updates_see_the_padding():
    torch.manual_seed(0)
    layer, x = AtrousConv2d(4, 6, (2, 3), dilation=3, stride=2).double(), torch.randn(2, 4, 7, 8, dtype=torch.float64)
    update = LoRAUpdate(layer, rank=2)
    torch.nn.init.normal_(update.b)
    merged = atrous_conv2d(x, update.merged(layer).weight, layer.bias, 2, 3)
    torch.testing.assert_close(update.update(layer, x, layer(x)), merged)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: atrous_conv2d(x[0], w), r"must have 4 axes, got \(3, 5, 5\) and \(4, 3, 3, 3\)"),
        (lambda x, w: atrous_conv2d(x, w[0]), r"must have 4 axes"),
        (lambda x, w: atrous_conv1d(x, w), r"atrous_conv1d: input and weight must have 3 axes"),
        (lambda x, w: atrous_conv2d(x[:, :2], w), r"got input \(2, 2, 5, 5\), weight \(4, 3, 3, 3\) and groups 1"),
        (lambda x, w: atrous_conv2d(x, w[:, :1], groups=3), r"d a multiple of groups.*groups 3"),
        (lambda x, w: atrous_conv2d(x, w, groups=0), "groups 0"),
        (
            lambda x, w: atrous_conv2d(x, w, dilation=0),
            "dilation must be at least 1, once or for each of 2 axes, got 0",
        ),
        (lambda x, w: atrous_conv2d(x, w, None, (1, 2, 1)), r"stride must be at least 1.*got \(1, 2, 1\)"),
        (lambda x, w: AtrousConv2d(3, 4, 0), "AtrousConv2d: kernel_size must be at least 1"),
        (lambda x, w: AtrousConv1d(3, 4, 3, dilation=-1), "AtrousConv1d: dilation must be at least 1"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3, 5, 5), torch.zeros(4, 3, 3, 3))
