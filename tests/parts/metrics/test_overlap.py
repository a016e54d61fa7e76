"""The four accuracies against hand cases, loops over classes and images, and torchmetrics; and where it misleads."""

from __future__ import annotations

import math

import pytest
import torch

from volvelle.functional import (
    class_accuracy,
    class_iou,
    confusion_matrix,
    frequency_weighted_iou,
    mean_iou,
    mean_pixel_accuracy,
    pixel_accuracy,
)

HAND = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
"""Classes 2 and 3 occur nowhere."""
FALSE_ALARM = torch.tensor([[6, 0, 2], [0, 2, 0], [0, 0, 0]])
"""Class 2 is predicted and is in no target."""


def matrices(n=5, k=6, seed=0):
    """A matrix an image, ragged in what occurs; one image is empty."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 50, (n, k, k), generator=generator)
    for target, predicted in ((True, True), (True, False), (False, True)):
        gone = torch.rand(n, k, generator=generator) < 0.2
        if target:
            found[gone] = 0
        if predicted:
            found.mT[gone] = 0
    found[n // 2] = 0
    return found


def quotient(a, b):
    return a / b if b else math.nan


def mean(values):
    kept = [v for v in values if not math.isnan(v)]
    return sum(kept) / len(kept) if kept else math.nan


def iou_by_loop(matrix, i):
    t, p = sum(matrix[i]), sum(row[i] for row in matrix)
    return quotient(matrix[i][i], t + p - matrix[i][i])


def accuracy_by_loop(matrix, i):
    return quotient(matrix[i][i], sum(matrix[i]))


def by_loop(images, value, average, absent="skip", without=()):
    images = [m.tolist() for m in images]
    if average == "dataset":
        k = len(images[0])
        images = [[[sum(m[i][j] for m in images) for j in range(k)] for i in range(k)]]
    rows = [[value(m, i) for i in range(len(m)) if i not in without] for m in images]
    if absent != "skip":
        rows = [[float(absent == "one") if math.isnan(v) else v for v in row] for row in rows]
    return mean([v for row in rows for v in row]) if average == "pair" else mean([mean(row) for row in rows])


def test_hand_case():
    assert float(pixel_accuracy(HAND)) == 9 / 12
    assert float(mean_pixel_accuracy(HAND)) == (6 / 8 + 3 / 4) / 2
    assert float(mean_iou(HAND)) == pytest.approx((6 / 9 + 3 / 6) / 2, rel=1e-15)
    assert float(frequency_weighted_iou(HAND)) == pytest.approx((8 * 6 / 9 + 4 * 3 / 6) / 12, rel=1e-15)
    assert class_iou(HAND)[2:].isnan().all()
    assert class_accuracy(HAND)[2:].isnan().all()


def test_a_class_that_is_only_predicted_counts_as_wrong():
    assert class_iou(FALSE_ALARM)[2] == 0
    assert float(mean_iou(FALSE_ALARM)) == pytest.approx((6 / 8 + 1 + 0) / 3)
    assert float(mean_pixel_accuracy(FALSE_ALARM)) == pytest.approx((6 / 8 + 1) / 2)


@pytest.mark.parametrize("average", ["dataset", "image", "pair"])
@pytest.mark.parametrize("absent", ["skip", "zero", "one"])
@pytest.mark.parametrize("without", [(), (0,), (1, 4)])
def test_every_policy_equals_the_loop(average, absent, without):
    images = matrices()
    options = {"average": average, "absent": absent, "without": without}
    assert float(mean_iou(images, **options)) == pytest.approx(by_loop(images, iou_by_loop, **options), rel=1e-12)
    expected = by_loop(images, accuracy_by_loop, **options)
    assert float(mean_pixel_accuracy(images, **options)) == pytest.approx(expected, rel=1e-12)


def test_policies_differ_where_they_should():
    images = matrices()
    found = {str(mean_iou(images, average=a, absent=b)) for a in ("dataset", "image", "pair") for b in ("skip", "zero")}
    # Over the data set nothing is absent, and where nothing is skipped images and pairs weigh alike.
    assert len(found) == 4


def test_images_weigh_alike_or_as_their_pixels():
    images = torch.tensor([[[90, 10], [0, 0]], [[0, 0], [1, 0]]])
    assert float(pixel_accuracy(images)) == pytest.approx(90 / 101)
    assert float(pixel_accuracy(images, average="image")) == pytest.approx((0.9 + 0) / 2)
    weighted = [90 / 100, 0.0]
    assert float(frequency_weighted_iou(images, average="image")) == pytest.approx(sum(weighted) / 2)


def test_nothing_to_measure_is_nan():
    empty = torch.zeros(3, 3, dtype=torch.int64)
    for metric in (pixel_accuracy, mean_pixel_accuracy, mean_iou, frequency_weighted_iou):
        assert metric(empty).isnan()
        assert metric(torch.zeros(0, 3, 3, dtype=torch.int64), average="image").isnan()
    assert mean_iou(empty, absent="one") == 1


def test_all_background():
    """Nearly every pixel right, and one class of eleven found."""
    k = 11
    target = torch.zeros(100, 100, dtype=torch.uint8)
    target[0] = torch.arange(100) % k
    matrix = confusion_matrix(torch.zeros_like(target), target, k)
    assert pixel_accuracy(matrix) > 0.99
    assert float(mean_iou(matrix)) == pytest.approx(float(pixel_accuracy(matrix)) / k, rel=1e-12)


def test_renaming_classes_changes_nothing_and_transposing_keeps_iou():
    images = matrices()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    renamed = images[:, order][:, :, order]
    for metric in (pixel_accuracy, mean_pixel_accuracy, mean_iou, frequency_weighted_iou):
        assert float(metric(renamed)) == pytest.approx(float(metric(images)), rel=1e-12)
    assert mean_iou(images.mT) == mean_iou(images)


def test_bad_calls_say_what_arrived():
    with pytest.raises(ValueError, match=r"mean_iou: matrix must be square, .* got \(2, 3\)"):
        mean_iou(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="average='image' needs a matrix an image"):
        mean_iou(HAND, average="image")
    with pytest.raises(ValueError, match="average must be one of dataset, image, got 'pair'"):
        pixel_accuracy(HAND, average="pair")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="absent must be skip, zero or one, got 'nan'"):
        mean_iou(HAND, absent="nan")  # type: ignore[arg-type]
    for wrong in (4, -1):
        with pytest.raises(ValueError, match=rf"without must name classes 0 … 3, got \[{wrong}\]"):
            mean_iou(HAND, without=(wrong,))
    for shape in ((2, 3, 4), (3,)):
        with pytest.raises(ValueError, match=r"class_iou: matrix must be square, \(…, k, k\), got"):
            class_iou(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"or \(n, k, k\) with one an image, got \(1, 2, 3, 3\)"):
        mean_iou(torch.zeros(1, 2, 3, 3))


def label_maps(k=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, k, (6, 12, 13), generator=generator)
    target[0], target[1, :, :6] = 0, k - 1
    preds = torch.where(torch.rand(target.shape, generator=generator) < 0.3, 0, target)
    return preds, target


def per_image(preds, target, k):
    return torch.stack([confusion_matrix(p, t, k) for p, t in zip(preds, target, strict=True)])


@pytest.mark.peer
def test_same_numbers_as_torchmetrics():
    tm = pytest.importorskip("torchmetrics")
    pytest.importorskip("torchmetrics.segmentation")
    preds, target = label_maps()
    whole, images = confusion_matrix(preds, target, 5), per_image(preds, target, 5)
    jaccard = tm.functional.jaccard_index
    options = {"task": "multiclass", "num_classes": 5}
    assert float(mean_iou(whole)) == pytest.approx(float(jaccard(preds, target, average="macro", **options)), rel=1e-6)
    theirs = float(jaccard(preds, target, average="weighted", **options))
    assert float(frequency_weighted_iou(whole)) == pytest.approx(theirs, rel=1e-6)
    accuracy = tm.functional.accuracy
    assert float(pixel_accuracy(whole)) == pytest.approx(
        float(accuracy(preds, target, average="micro", **options)), rel=1e-6
    )
    theirs = float(accuracy(preds, target, average="macro", **options))
    assert float(mean_pixel_accuracy(whole)) == pytest.approx(theirs, rel=1e-6)
    over_pairs = tm.segmentation.MeanIoU(5, input_format="index")
    for part in (slice(0, 4), slice(4, 6)):
        over_pairs.update(preds[part], target[part])
    assert float(mean_iou(images, average="pair")) == pytest.approx(float(over_pairs.compute()), rel=1e-6)
    assert abs(float(mean_iou(images)) - float(over_pairs.compute())) > 0.01  # another question


@pytest.mark.peer
def test_a_void_label_breaks_the_peers_mean_iou_and_not_ours():
    segmentation = pytest.importorskip("torchmetrics.segmentation")
    preds, target = label_maps()
    target[:, 0] = 255
    with pytest.raises((RuntimeError, IndexError)):
        segmentation.MeanIoU(5, input_format="index").update(preds, target)
    known = target != 255
    assert float(mean_iou(confusion_matrix(preds, target, 5))) == float(
        mean_iou(confusion_matrix(preds[known], target[known], 5))
    )


@pytest.mark.peer
def test_an_absent_class_is_nan_here_zero_in_jaccard_and_minus_one_in_mean_iou():
    tm = pytest.importorskip("torchmetrics")
    segmentation = pytest.importorskip("torchmetrics.segmentation")
    preds = target = torch.zeros(2, 4, 4, dtype=torch.int64)
    ours = class_iou(confusion_matrix(preds, target, 3))
    assert ours[0] == 1
    assert ours[1:].isnan().all()
    jaccard = tm.functional.jaccard_index(preds, target, task="multiclass", num_classes=3, average=None)
    assert jaccard.tolist() == [1, 0, 0]
    mean = segmentation.MeanIoU(3, per_class=True, input_format="index")
    mean.update(preds, target)
    assert mean.compute().tolist() == [1, -1, -1]


@pytest.mark.peer
def test_a_large_data_set_is_exact_where_the_peer_rounds():
    pytest.importorskip("torchmetrics")
    from torchmetrics.functional.classification.jaccard import _jaccard_index_reduce

    matrix = torch.tensor([[2**24 + 1, 1], [0, 2**24]])
    assert float(class_iou(matrix)[0]) == (2**24 + 1) / (2**24 + 2)
    assert float(_jaccard_index_reduce(matrix, "none")[0]) != (2**24 + 1) / (2**24 + 2)
