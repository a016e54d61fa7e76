"""Boundary IoU against erosions written as loops, and where it sees what mask IoU does not."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from volvelle.functional import boundary_counts, boundary_iou, class_iou, confusion_matrix


def eroded(region, void):
    """One erosion by a 3 x 3 square; void pixels belong to the region, what lies outside the image does not."""
    y, x = region.shape
    out = np.zeros_like(region)
    for i in range(y):
        for j in range(x):
            around = [
                0 <= i + a < y and 0 <= j + b < x and bool(region[i + a, j + b] or void[i + a, j + b])
                for a in (-1, 0, 1)
                for b in (-1, 0, 1)
            ]
            out[i, j] = all(around)
    return out


def outline_by_loop(labels, void, c, d):
    region = labels == c
    inner = region | void
    for _ in range(d):
        inner = eroded(inner, np.zeros_like(void)) if not void.any() else eroded(inner, void)
    return region & ~inner & ~void


def maps(seed, shape=(2, 13, 17), k=3, void=0.0):
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, k, (shape[0], 4, 5))
    target = coarse.repeat(4, 1).repeat(4, 2)[:, : shape[1], : shape[2]]
    preds = np.roll(target, 1, axis=2)
    hidden = draw.random(target.shape) < void
    return torch.from_numpy(preds), torch.from_numpy(np.where(hidden, 255, target))


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.2])
@pytest.mark.parametrize("void", [0.0, 0.03])
def test_counts_equal_erosions_by_loop(ratio, void):
    preds, target = maps(3, void=void)
    d = max(1, round(ratio * math.hypot(13, 17)))
    both, either = boundary_counts(preds, target, 3, dilation_ratio=ratio)
    for n in range(2):
        hidden = target[n].numpy() == 255
        for c in range(3):
            ours = outline_by_loop(preds[n].numpy(), hidden, c, d)
            theirs = outline_by_loop(target[n].numpy(), hidden, c, d)
            assert int(both[n, c]) == int((ours & theirs).sum())
            assert int(either[n, c]) == int((ours | theirs).sum())


def test_a_thin_slip_costs_the_outline_more_than_the_mask():
    target = torch.zeros(1, 200, 200, dtype=torch.uint8)
    target[:, 20:180, 20:180] = 1
    preds = torch.roll(target, 2, dims=2)
    masks = float(class_iou(confusion_matrix(preds, target, 2))[1])
    outlines = float(boundary_iou(*boundary_counts(preds, target, 2, dilation_ratio=0.01), without=(0,)))
    assert masks > 0.97
    assert outlines < 0.75
    assert float(boundary_iou(*boundary_counts(target, target, 2))) == 1


def test_wide_outlines_are_the_whole_mask():
    preds, target = maps(1)
    both, either = boundary_counts(preds, target, 3, dilation_ratio=2.0)
    expected = class_iou(torch.stack([confusion_matrix(p, t, 3) for p, t in zip(preds, target, strict=True)]))
    torch.testing.assert_close(both / either, expected, check_dtype=False)


def test_batches_add_up_and_averages_differ():
    preds, target = maps(5, shape=(4, 13, 17))
    whole = boundary_counts(preds, target, 3)
    parts = [boundary_counts(preds[i : i + 2], target[i : i + 2], 3) for i in (0, 2)]
    for which in (0, 1):
        assert torch.equal(whole[which], torch.cat([part[which] for part in parts]))
    assert len({float(boundary_iou(*whole, average=a)) for a in ("dataset", "image", "pair")}) > 1


@pytest.mark.parametrize(
    ("average", "expected"),
    [("dataset", (1 + 5 / 12) / 2), ("image", ((1 + 3 / 4) / 2 + 2 / 8) / 2), ("pair", (1 + 3 / 4 + 2 / 8) / 3)],
)
def test_averages_by_hand(average, expected):
    """Of two pictures, the second without the first class, whose outline is one pixel in the other."""
    found = boundary_iou(torch.tensor([[1, 3], [0, 2]]), torch.tensor([[1, 4], [0, 8]]), average=average)
    assert found.shape == ()
    assert float(found) == pytest.approx(expected)


def test_absent_classes_and_empty_batches():
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    counts = boundary_counts(labels, labels, 2)
    assert float(boundary_iou(*counts)) == 1
    assert float(boundary_iou(*counts, absent="zero")) == 0.5
    assert boundary_iou(*boundary_counts(labels[:0], labels[:0], 2)).isnan()
    void = torch.full_like(labels, 255)
    assert boundary_iou(*boundary_counts(labels, void, 2)).isnan()


def test_bad_calls_say_what_arrived():
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    with pytest.raises(TypeError, match="target must hold class numbers"):
        boundary_counts(labels, labels.float(), 2)
    with pytest.raises(ValueError, match=r"both be \(n, y, x\), got \(8, 8\)"):
        boundary_counts(labels[0], labels[0], 2)
    with pytest.raises(ValueError, match="dilation_ratio must be above 0, got 0"):
        boundary_counts(labels, labels, 2, dilation_ratio=0)
    for one, two in (((1, 2), (2,)), ((2,), (2,)), ((1, 2), (2, 2))):
        with pytest.raises(ValueError, match=re.escape(f"got {one} and {two}")):
            boundary_iou(torch.zeros(one), torch.zeros(two))
