"""Tests of the vision parts can fail: each mistake below, made on purpose, is caught by the test that is named."""

from __future__ import annotations

import pytest
import torch
from tests.parts.convolution import test_atrous, test_hybrid_dilation, test_inverted_residual
from tests.parts.metrics import test_boundary, test_confusion, test_lovasz, test_overlap
from tests.parts.resampling import test_interpolation, test_pixel_shuffle, test_unpooling
from tests.systems.backbone import test_backbone
from tests.systems.segmentation import test_segmenters

from volvelle.parts.convolution import atrous, conv2d_same, hybrid_dilation
from volvelle.parts.metrics import boundary, lovasz, overlap
from volvelle.systems.backbone import folding
from volvelle.systems.segmentation import inference


def counts():
    preds, target = test_confusion.maps(3, (2, 9, 5), void=0.3)
    found = test_confusion.confusion_matrix(preds, target, 3)
    assert found.tolist() == test_confusion.loop(preds, target, 3, 255)


def policy(average, absent="skip"):
    return lambda: test_overlap.test_every_policy_equals_the_loop(average, absent, ())


def union_twice(matrix):
    hits = matrix.diagonal(dim1=-2, dim2=-1)
    return overlap._ratio(hits, matrix.sum(-1) + matrix.sum(-2))


def without_bias(original):
    def folded(layer, norm):
        weight, bias = original(layer, norm)
        return weight, torch.zeros_like(bias)

    return folded


def other_phases(original):
    return lambda x, s: original(x.unflatten(1, (-1, s, s)).transpose(2, 3).flatten(1, 3), s)


def of_other_pixels(original):
    return lambda values, indices, *sizes, **more: original(values, indices.flip(-1), *sizes, **more)


MUTANTS = {
    "SAME pads before, not behind": (
        conv2d_same, "same_zeros", lambda f: lambda *a: f(*a)[::-1],
        lambda: test_inverted_residual.test_same_padding_is_tensorflow_s((7, 8), 3, 2, 1),
    ),
    "padding without the rate": (
        atrous, "same_padding", lambda f: lambda kernel, rate: f(kernel, [1] * len(rate)),
        lambda: test_atrous.test_sequences_equal_the_loop(3, 2, 1),
    ),
    "a rate too large by one": (
        hybrid_dilation, "_limit", lambda f: lambda *a: f(*a) + 1,
        lambda: test_hybrid_dilation.test_the_rates_keep_the_papers_rules(3, 3),
    ),
    "dropped branches are not made up for": (
        test_inverted_residual.f, "drop_path", lambda f: lambda x, rate, **o: f(x, rate, **o) * (1 - rate),
        test_inverted_residual.test_dropped_branches_keep_the_mean,
    ),
    "phases of the shuffle exchanged": (
        test_pixel_shuffle, "pixel_shuffle", other_phases, lambda: test_pixel_shuffle.test_the_shuffle(2, 3)
    ),
    "ICNR without copies": (
        test_pixel_shuffle, "icnr_init", lambda _: lambda weight, s, init, **o: init(weight),
        lambda: test_pixel_shuffle.test_it_starts_as_nearest_upsampling_of_a_convolution("kaiming", 2, 1, 2),
    ),
    "corners never aligned": (
        test_interpolation, "resize_bilinear", lambda f: lambda x, size, align_corners=False: f(x, size),
        lambda: test_interpolation.test_torch((10, 14)),
    ),
    "nearest from the other side": (
        test_interpolation, "resize_nearest", lambda f: lambda x, size: f(x.flip(-1), size).flip(-1),
        lambda: test_interpolation.test_torch((3, 20)),
    ),
    "unpooled to other places": (
        test_unpooling, "max_unpool2d", of_other_pixels,
        lambda: test_unpooling.test_values_return_to_where_they_came_from({"kernel_size": 2}, (6, 6)),
    ),
    "rows and columns exchanged": (
        test_confusion, "confusion_matrix", lambda f: lambda *a, **o: f(*a, **o).T, counts
    ),
    "the void counts": (
        test_confusion, "confusion_matrix", lambda f: lambda p, t, k, **o: f(p, t.where(t < k, 0), k, **o), counts
    ),
    "hits counted twice in the union": (overlap, "class_iou", lambda _: union_twice, policy("dataset")),
    "an absent class has 0": (overlap, "_ratio", lambda f: lambda *a: f(*a).nan_to_num(), policy("pair")),
    "pairs averaged by image": (
        overlap, "mean_over_classes",
        lambda f: lambda v, *, average, **o: f(v, average="image" if average == "pair" else average, **o),
        policy("pair"),
    ),
    "outlines wider by one": (
        boundary, "_outline", lambda f: lambda region, void, d: f(region, void, d + 1),
        lambda: test_boundary.test_counts_equal_erosions_by_loop(0.1, 0.0),
    ),
    "Jaccard losses not differenced": (
        lovasz, "_steps", lambda f: lambda truth: f(truth).cumsum(0),
        lambda: test_lovasz.test_equals_the_definition("all"),
    ),
    "a fold without the norm's bias": (
        folding, "folded", without_bias,
        lambda: test_backbone.test_folding_keeps_the_function_and_is_undone_bit_by_bit("snet49"),
    ),
    "no window at the far end": (
        inference, "starts", lambda f: lambda *a: list(f(*a))[:-1],
        test_segmenters.test_windows_cover_a_picture_once_on_average,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_is_caught(mistake, monkeypatch):
    place, attribute, make, check = MUTANTS[mistake]
    torch.manual_seed(0)
    check()
    monkeypatch.setattr(place, attribute, make(getattr(place, attribute)))
    torch.manual_seed(0)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check()
