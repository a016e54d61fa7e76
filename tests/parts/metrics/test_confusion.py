"""The confusion matrix against a loop over pixels, against torchmetrics, in every dtype, and however it is cut."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st

from volvelle.functional import confusion_matrix
from volvelle.nn import ConfusionMatrix
from volvelle.parts.metrics import confusion

DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def loop(preds, target, k, ignored=255):
    """By definition, pixel by pixel."""
    matrix = [[0] * k for _ in range(k)]
    for p, t in zip(preds.flatten().tolist(), target.flatten().tolist(), strict=True):
        if t != ignored:
            matrix[t][p] += 1
    return matrix


def maps(k, shape, seed=0, void=0.0, ignored=255):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, k, shape, generator=generator)
    wrong = torch.rand(shape, generator=generator) < 0.4
    preds = torch.where(wrong, torch.randint(0, k, shape, generator=generator), target)
    hidden = torch.rand(shape, generator=generator) < void
    return preds, torch.where(hidden, torch.tensor(ignored), target)


@settings(max_examples=60, deadline=None)
@example(k=128, dtype=torch.int8, ignored=-1, seed=0, shape=(2, 9, 5))
@example(k=256, dtype=torch.uint8, ignored=None, seed=1, shape=(2, 9, 5))
@example(k=11, dtype=torch.uint8, ignored=46, seed=0, shape=(2, 9, 5))  # its pairs would pass the end of a byte
@example(k=200, dtype=torch.int64, ignored=-1, seed=0, shape=(2, 9, 5))
@given(
    k=st.sampled_from([1, 2, 11, 14, 15, 16, 17, 100, 127, 128, 180, 181, 200, 300]),
    dtype=st.sampled_from(DTYPES),
    ignored=st.sampled_from([None, 255, 0, 1, 11, 16, -1, -100, 100, 127, 250, 256, 1000, 40_000]),
    seed=st.integers(0, 10),
    shape=st.sampled_from([(0,), (1,), (7,), (2, 9, 5), (3, 1, 64)]),
)
def test_every_dtype_width_and_ignored_label_equals_the_loop(k, dtype, ignored, seed, shape):
    limits = torch.iinfo(dtype)
    if k - 1 > limits.max or (ignored is not None and not limits.min <= ignored <= limits.max):
        return
    preds, target = maps(k, shape, seed, void=0.0 if ignored is None else 0.3, ignored=ignored or 0)
    want = loop(preds, target, k, ignored)
    for check in (True, False):
        found = confusion_matrix(preds.to(dtype), target.to(dtype), k, ignore_index=ignored, validate_args=check)
        assert found.dtype == torch.int64
        assert found.tolist() == want


WIDTHS = {
    "byte": ((1, 2, 5, 8, 11, 14, 15), range(-300, 1300)),
    "short": ((16, 100, 180), [*range(-3, 0), *range(100, 400, 7), *range(2000, 2060), *range(4090, 40_000, 501)]),
    "long": ((181, 300), [-1, -400, 181, 300, 301, 2**20]),
}
"""Numbers of classes for which a pair of labels takes a byte, two of them or eight, and labels to ignore."""


@pytest.mark.parametrize("width", WIDTHS)
def test_no_ignored_label_counts_anywhere(width):
    """Every pair of classes once, and an ignored pixel with each prediction: whatever its label makes of the pair."""
    for k in WIDTHS[width][0]:
        classes = torch.arange(k)
        for ignored in (label for label in WIDTHS[width][1] if not 0 <= label < k):
            target = torch.cat((classes.repeat_interleave(k), torch.full((k,), ignored)))
            preds = torch.cat((classes.repeat(k), classes))
            found = confusion_matrix(preds, target, k, ignore_index=ignored, validate_args=False)
            assert found.eq(1).all(), (k, ignored)


def test_the_least_label_of_a_dtype_may_be_ignored():
    target = torch.tensor([0, -128, 1], dtype=torch.int8)
    assert confusion_matrix(torch.tensor([0, 0, 1]), target, 2, ignore_index=-128).tolist() == [[1, 0], [0, 1]]


def test_an_ignored_label_that_the_dtype_cannot_hold_hides_nothing():
    preds = target = torch.tensor([255, 0], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"target holds labels outside 0 … 1 .*: 255"):
        confusion_matrix(preds, target, 2, ignore_index=-1)
    assert confusion_matrix(target[1:], target[1:], 2, ignore_index=-1).tolist() == [[1, 0], [0, 0]]


def test_what_is_predicted_at_ignored_pixels_does_not_matter():
    target = torch.tensor([0, 255, 1], dtype=torch.uint8)
    for strange in (0, 1, 7, 255):
        preds = torch.tensor([1, strange, 1], dtype=torch.uint8)
        assert confusion_matrix(preds, target, 2).tolist() == [[0, 1], [0, 1]]


def test_strided_maps_and_blocks_count_alike(monkeypatch):
    preds, target = maps(11, (3, 40, 30), void=0.1)
    whole = confusion_matrix(preds, target, 11)
    turned = confusion_matrix(preds.mT, target.mT, 11)
    monkeypatch.setattr(confusion, "BLOCK", 97)
    assert torch.equal(whole, turned)
    assert torch.equal(whole, confusion_matrix(preds, target, 11))
    assert torch.equal(whole, confusion_matrix(preds.byte()[:, ::1], target.byte(), 11))


def test_unknown_labels_are_listed():
    good = torch.zeros(4, dtype=torch.uint8)
    bad = torch.tensor([0, 3, 9, 3], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"target holds labels outside 0 … 2 \(nor 255, which is ignored\): 3, 9"):
        confusion_matrix(good, bad, 3)
    with pytest.raises(ValueError, match="preds holds labels outside 0 … 2: 3, 9"):
        confusion_matrix(bad, good, 3)
    with pytest.raises(ValueError, match=r"target .*: -1"):
        confusion_matrix(good.long(), good.long() - 1, 3)
    many = torch.arange(40)
    with pytest.raises(ValueError, match=r"3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 27 more$"):
        confusion_matrix(many * 0, many, 3)
    with pytest.raises(ValueError, match=r"3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 1 more$"):
        confusion_matrix(many[:14] * 0, many[:14], 3)
    with pytest.raises(ValueError, match=r"3, 4, 5, 6, 7, 8, 9, 10, 11, 12$"):
        confusion_matrix(many[:13] * 0, many[:13], 3)


def test_wrong_maps_say_what_arrived():
    labels = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"preds must hold class numbers .* got torch.float32"):
        confusion_matrix(labels.float(), labels, 2)
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(3, 2\)"):
        confusion_matrix(labels, labels.mT, 2)
    with pytest.raises(TypeError, match=r"target must hold class numbers .* got torch.complex64"):
        confusion_matrix(labels, labels.to(torch.complex64), 2)
    with pytest.raises(ValueError, match="confusion_matrix: num_classes must be at least 1, got 0"):
        confusion_matrix(labels, labels, 0)
    with pytest.raises(ValueError, match="ConfusionMatrix: num_classes must be at least 1, got 0"):
        ConfusionMatrix(0)


def test_bool_maps_are_two_classes():
    preds, target = torch.tensor([True, False, True]), torch.tensor([True, True, False])
    assert confusion_matrix(preds, target, 2).tolist() == [[0, 1], [1, 1]]
    assert confusion_matrix(preds, target, 2, ignore_index=1).tolist() == [[0, 1], [0, 0]]
    with pytest.raises(ValueError, match=r"target holds labels outside 0 … 0 .*: 1"):
        confusion_matrix(preds & False, target, 1)


def test_a_module_asks_as_the_function_does():
    """Its defaults are the function's, and the images of one batch are counted one by one only when asked."""
    target = torch.tensor([[0, 255], [1, 1]])
    seen = ConfusionMatrix(2)
    assert torch.equal(seen(target.clamp(max=1), target), confusion_matrix(target.clamp(max=1), target, 2))
    with pytest.raises(ValueError, match="preds holds labels outside"):
        seen.update(target.fill_(2), torch.zeros_like(target))
    assert not seen.state_dict(), "counts are no weights"
    assert ConfusionMatrix(1)(torch.zeros(2).long(), torch.tensor([0, 255])).tolist() == [[1]]
    kept = ConfusionMatrix(3, ignore_index=1, per_image=True)
    assert kept(torch.tensor([[0, 1], [2, 1]]), torch.tensor([[0, 1], [0, 2]])).tolist() == [
        [1, 0, 1], [0, 0, 0], [0, 1, 0]
    ]  # fmt: skip
    assert kept.images.sum((1, 2)).tolist() == [1, 2]
    with pytest.raises(ValueError, match="one shape"):
        kept.update(torch.zeros(2, 3).long(), torch.zeros(2, 2).long())


def test_counts_stay_exact_where_floats_stop():
    seen = ConfusionMatrix(2)
    seen.matrix[0, 0] = 2**53
    seen.update(torch.tensor([0]), torch.tensor([0]))
    assert int(seen.matrix[0, 0]) == 2**53 + 1


def test_batches_equal_one_call_and_images_are_kept():
    preds, target = maps(5, (7, 8, 9), void=0.2)
    seen = ConfusionMatrix(5, per_image=True)
    for a, b in ((0, 3), (3, 3), (3, 7)):
        seen.update(preds[a:b], target[a:b])
    assert torch.equal(seen.matrix, confusion_matrix(preds, target, 5))
    assert seen.images.tolist() == [loop(p, t, 5) for p, t in zip(preds, target, strict=True)]
    seen.reset()
    assert int(seen.matrix.sum()) == 0
    assert seen.images.shape == (0, 5, 5)
    with pytest.raises(ValueError, match="per_image=True only"):
        _ = ConfusionMatrix(2).images


def test_a_batch_with_a_bad_label_leaves_nothing_behind():
    seen = ConfusionMatrix(2, per_image=True)
    with pytest.raises(ValueError, match="labels outside"):
        seen.update(torch.zeros(2, 3, dtype=torch.uint8), torch.tensor([[0, 1, 0], [0, 1, 7]], dtype=torch.uint8))
    assert int(seen.matrix.sum()) == len(seen.images) == 0


def test_one_process_is_its_own_whole(tmp_path):
    seen = ConfusionMatrix(2)
    seen.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert seen.over_ranks().tolist() == [[1, 1], [0, 0]]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert seen.over_ranks().tolist() == seen.over_ranks().tolist() == [[1, 1], [0, 0]]
    finally:
        dist.destroy_process_group()


def test_the_whole_is_asked_of_all_ranks(monkeypatch):
    seen = ConfusionMatrix(2)
    seen.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda total, op, group: total.mul_(3))
    assert seen.over_ranks().tolist() == [[3, 3], [0, 0]]
    assert seen.matrix.tolist() == [[1, 1], [0, 0]]


def counted_by(rank):
    """What one rank of three adds to, and then the whole, asked for twice."""
    preds, target = maps(6, (9, 4, 4), void=0.2)
    seen = ConfusionMatrix(6)
    seen.update(preds[rank::3], target[rank::3])
    return [seen.over_ranks().tolist(), seen.over_ranks().tolist(), int(seen.matrix.sum())]


@pytest.mark.slow
def test_ranks_add_up():
    from tests.parts.collectives.ranks import Ranks

    preds, target = maps(6, (9, 4, 4), void=0.2)
    whole = loop(preds, target, 6)
    ranks = Ranks(3)
    try:
        answers = ranks.run(counted_by)
    finally:
        ranks.close()
    assert all(first == second == whole for first, second, _ in answers)
    assert sum(own for *_, own in answers) == sum(map(sum, whole))


@pytest.mark.peer
def test_torchmetrics_counts_the_same():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    for k, ignored in ((3, None), (12, 255), (12, 11), (40, -1)):
        preds, target = maps(k, (4, 33, 21), seed=k, void=0.0 if ignored is None else 0.2, ignored=ignored or 0)
        theirs = torchmetrics.multiclass_confusion_matrix(preds, target, k, ignore_index=ignored)
        assert torch.equal(confusion_matrix(preds, target, k, ignore_index=ignored), theirs)
